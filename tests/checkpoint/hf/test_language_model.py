"""A release with a vision tower beside the language model: that is taken, the rest is named."""

import json

import pytest
import torch

from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX
from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.verify.compare import compare, open_weights
from megatron_k2.cli.convert import main
from megatron_k2.engine.mcore.compare_logits import compare_logits
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import QUANTIZATION, as_fp8, random_weights, write_directory

VISION = {
    "vision_tower.patch_embed.proj.weight": torch.zeros(8, 3, 2, 2),
    "vision_tower.encoder.blocks.0.norm0.weight": torch.ones(8),
    "mm_projector.linear_1.weight": torch.zeros(32, 8),
}


def kimi_k25(name):
    return f"language_model.{name}"


def transformers_5(name):
    return (
        name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
    )


def nested_config(**top):
    text = hf_config(TINY) | {"_name_or_path": "", "top_k": 50, "id2label": {"0": "LABEL_0"}}
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "vision_config": {"vt_hidden_size": 8},
        "media_placeholder_token_id": 3,
    } | top


def composite(directory, weights, rename, config=None):
    """A directory of the renamed weights beside a vision tower's; None: a config without it."""
    in_model = {n if rename is kimi_k25 else f"model.{n}": w for n, w in VISION.items()}
    write_directory(directory, TINY, {rename(n): w for n, w in weights.items()} | in_model)
    (directory / "config.json").write_text(json.dumps(config or hf_config(TINY)))
    return directory


@pytest.mark.parametrize("config", [nested_config(), None], ids=["text_config", "flat"])
@pytest.mark.parametrize("rename", [kimi_k25, transformers_5])
def test_the_language_model_is_imported_and_the_rest_named(tmp_path, capsys, rename, config):
    weights = random_weights(TINY)
    plain = write_directory(tmp_path / "plain", TINY, weights)
    release = composite(tmp_path / "hf", weights, rename, config)
    assert main(["audit", str(release)]) == 0
    assert main(["import", str(release), str(tmp_path / "megatron"), "--workers", "1"]) == 0
    said = "not of the language model, left out: mm_projector (1), vision_tower (2)"
    assert capsys.readouterr().out.count(said) == 2
    assert compare(open_weights(tmp_path / "megatron"), open_weights(plain)).is_equal
    assert compare(open_weights(release), open_weights(plain)).is_equal
    logits = compare_logits(tmp_path / "megatron", release)
    assert logits.max_abs_difference < 1e-5 * logits.max_abs_reference


def test_the_export_is_a_language_model_of_its_own(tmp_path):
    left_alone = ["vision_tower", "language_model.model.layers.1.self_attn", "lm_head"]
    quantization = QUANTIZATION | {"modules_to_not_convert": left_alone}
    config = nested_config(eos_token_id=9, dtype="bfloat16", quantization_config=quantization)
    del config["text_config"]["eos_token_id"], config["text_config"]["torch_dtype"]
    weights = as_fp8(random_weights(TINY))
    for name, weight in random_weights(TINY).items():
        if name.startswith("model.layers.1.self_attn."):
            weights[name] = weight
            weights.pop(name + SCALE_SUFFIX, None)
    release = composite(tmp_path / "hf", weights, kimi_k25, config)
    import_hf(release, tmp_path / "m", ImportOptions())
    export(tmp_path / "m", tmp_path / "back", ExportOptions(dtype="fp8"))
    back = HfSource(tmp_path / "back")
    assert {n: str(t.dtype) for n, t in back.stored.items()} == {
        name: str(tensor.dtype).removeprefix("torch.") for name, tensor in weights.items()
    }
    text = config["text_config"] | {"eos_token_id": 9, "dtype": "bfloat16"}
    own = ["vision_tower", "model.layers.1.self_attn", "lm_head"]
    quantization = QUANTIZATION | {"modules_to_not_convert": own}
    assert back.config == text | {"quantization_config": quantization}


def test_a_key_that_changes_the_computation_is_refused_inside_too(tmp_path):
    config = nested_config()
    config["text_config"] |= {"index_topk": 2048}
    release = composite(tmp_path / "hf", random_weights(TINY), kimi_k25, config)
    with pytest.raises(UserError, match="index_topk=2048 is no key"):
        import_hf(release, tmp_path / "out", ImportOptions())


@pytest.mark.parametrize("text", ["kimi_k2", [1], 3])
def test_a_text_config_of_another_type_is_refused(tmp_path, text):
    config = nested_config(text_config=text)
    release = composite(tmp_path / "hf", random_weights(TINY), kimi_k25, config)
    with pytest.raises(UserError, match=r"text_config=.*, expected an object"):
        import_hf(release, tmp_path / "out", ImportOptions())


def test_a_tensor_by_both_names_is_refused(tmp_path):
    weights = random_weights(TINY)
    both = {kimi_k25(n): w for n, w in weights.items()} | {
        "lm_head.weight": weights["lm_head.weight"]
    }
    write_directory(tmp_path / "hf", TINY, both)
    with pytest.raises(UserError, match=r"'lm_head.weight' is in the release twice"):
        import_hf(tmp_path / "hf", tmp_path / "out", ImportOptions())


def test_packed_integers_without_the_section_that_says_so_are_refused_with_the_way_out(tmp_path):
    weights = random_weights(TINY)
    for name in [name for name in weights if ".experts." in name]:
        out, width = weights.pop(name).shape
        at = name.removesuffix("weight")
        weights[f"{at}weight_packed"] = torch.zeros(out, width // 8, dtype=torch.int32)
        weights[f"{at}weight_scale"] = torch.ones(out, 1).bfloat16()
    release = write_directory(tmp_path / "hf", TINY, weights)
    with pytest.raises(UserError, match=r"compressed-tensors.*put the release's own back, or deq"):
        import_hf(release, tmp_path / "out", ImportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
