"""DeepSeek-V3's layer 61, through the same rules; and Moonlight's queries without a latent."""

import copy
import dataclasses

import pytest
import torch

from megatron_k2.checkpoint.block_fp8.layout import is_quantized
from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf.audit import audit_source, released_tensors
from megatron_k2.checkpoint.hf.preset import preset_from_hf
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.names.audit import audit
from megatron_k2.checkpoint.names.mapping import expand, hf_state_to_megatron, megatron_state_to_hf
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.cli.convert import main
from megatron_k2.engine.mcore.compare_logits import compare_logits
from megatron_k2.errors import UserError
from megatron_k2.run.iterations import find_iteration
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory

DEEPSEEK_V3 = {
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""``config.json`` of deepseek-ai/DeepSeek-V3, as far as it says something about the model."""

PUBLISHED_BYTES = 688_586_727_753
"""Of DeepSeek-V3's 163 safetensors files, headers included."""

SMALL = dataclasses.replace(TINY, num_mtp_layers=2)
MOONLIGHT = dataclasses.replace(TINY, q_lora_rank=None, num_shared_experts=2, yarn=None)


def with_copies(preset, weights):
    """A release's prediction layers repeat the model's embedding and head."""
    for layer in range(preset.num_layers, preset.num_layers + preset.num_mtp_layers):
        prefix = f"model.layers.{layer}."
        weights[f"{prefix}embed_tokens.weight"] = weights["model.embed_tokens.weight"]
        weights[f"{prefix}shared_head.head.weight"] = weights["lm_head.weight"]
    return weights


def small_release(directory, preset=SMALL, dtype=torch.bfloat16, is_fp8=False):
    weights = with_copies(preset, random_weights(preset, dtype))
    return write_directory(directory, preset, as_fp8(weights) if is_fp8 else weights)


def tensors(directory):
    source = HfSource(directory)
    return {name: source.read(name).tensor().clone() for name in source.stored}


def test_deepseek_v3_is_accounted_for_to_the_last_tensor_and_byte():
    preset = preset_from_hf(DEEPSEEK_V3)
    release = released_tensors(preset)
    found = audit_source(release, preset)
    assert found.findings == ()
    assert audit({pair.megatron: pair.megatron_shape for pair in expand(preset)}, preset) == []
    own = {name: t for name, t in release.items() if "inv_freq" not in name}  # K2's leftover only
    assert len(own) == 91_991
    # a header has a name, a dtype, a shape and two offsets: about 130 bytes a tensor
    header_bytes = PUBLISHED_BYTES - sum(tensor.num_bytes for tensor in own.values())
    assert 100 * len(own) < header_bytes < 150 * len(own)
    # without the copies, or with eh_proj in FP8, it would be off by 100 MB and more
    assert not is_quantized("model.layers.61.eh_proj.weight")


def test_layer_61_goes_to_megatrons_prediction_layer():
    names = {name: p.megatron for p in expand(preset_from_hf(DEEPSEEK_V3)) for name in p.hf}
    mtp, layer = "mtp.layers.0.", "model.layers.61."
    expected = {
        "enorm.weight": f"{mtp}enorm.weight",
        "hnorm.weight": f"{mtp}hnorm.weight",
        "eh_proj.weight": f"{mtp}eh_proj.weight",
        "shared_head.norm.weight": f"{mtp}final_layernorm.weight",
        "embed_tokens.weight": "embedding.word_embeddings.weight",
        "shared_head.head.weight": "output_layer.weight",
        "self_attn.o_proj.weight": f"{mtp}mtp_model_layer.self_attention.linear_proj.weight",
        "mlp.experts.255.up_proj.weight": (
            f"{mtp}mtp_model_layer.mlp.experts.local_experts.255.linear_fc1.weight"
        ),
    }
    assert {name: names[layer + name] for name in expected} == expected
    assert names["model.norm.weight"] == "decoder.final_layernorm.weight"


@pytest.mark.parametrize("is_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("modules", ["local", "te"])
def test_prediction_layers_come_back_byte_for_byte(tmp_path, is_fp8, modules):
    release = small_release(tmp_path / "hf", is_fp8=is_fp8)
    import_hf(release, tmp_path / "megatron", ImportOptions(modules=modules))
    dtype = "fp8" if is_fp8 else "bf16"
    export(tmp_path / "megatron", tmp_path / "back", ExportOptions(dtype=dtype))
    before, after = tensors(release), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert (tmp_path / "back" / "config.json").read_text() != ""
    assert preset_from_hf(HfSource(tmp_path / "back").config).num_mtp_layers == 2


def test_moonlights_shape_comes_back_byte_for_byte(tmp_path):
    release = small_release(tmp_path / "hf", MOONLIGHT)
    import_hf(release, tmp_path / "megatron", ImportOptions(preset="moonlight-16b-a3b"))
    export(tmp_path / "megatron", tmp_path / "back", ExportOptions())
    before, after = tensors(release), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert not [name for name in before if "q_a_proj" in name]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_embedding_of_its_own_is_refused_since_megatron_shares_the_models(tmp_path):
    weights = with_copies(SMALL, random_weights(SMALL))
    name = "model.layers.4.shared_head.head.weight"
    weights[name] = weights[name].clone()
    weights[name][60, 31] += 1
    write_directory(tmp_path / "hf", SMALL, weights)
    with pytest.raises(UserError, match=rf"'{name}' differs from 'lm_head.weight'"):
        import_hf(tmp_path / "hf", tmp_path / "out", ImportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(UserError, match=f"'{name}' is not the model's own"):
        hf_state_to_megatron(weights, SMALL)


def test_in_memory_there_and_back():
    weights = with_copies(SMALL, random_weights(SMALL))
    back = megatron_state_to_hf(hf_state_to_megatron(weights, SMALL), SMALL)
    assert back.keys() == weights.keys()
    assert all(torch.equal(weights[name], back[name]) for name in weights)


@pytest.mark.slow
def test_megatrons_own_model_loads_an_imported_prediction_layer(tmp_path):
    """Names as Megatron stores them; with one tensor elsewhere, its loader would not find it."""
    from megatron_k2.engine.mcore.ranks import opened_model, process_group
    from megatron_k2.engine.mcore.saved_args import read_saved_args
    from megatron_k2.parallel.layout import Layout

    preset = dataclasses.replace(TINY, num_mtp_layers=1, yarn=None)
    release = small_release(tmp_path / "hf", preset, torch.float32)
    import_hf(release, tmp_path / "megatron", ImportOptions())
    iteration, saved = read_saved_args(tmp_path / "megatron", None)
    assert saved.mtp_num_layers == 1
    expected = hf_state_to_megatron(tensors(release), preset)
    with process_group(), opened_model(iteration, copy.copy(saved), Layout()) as model:
        state = {n: t for n, t in model.stages[0].state_dict().items() if torch.is_tensor(t)}
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    found = compare_logits(tmp_path / "megatron", release)
    assert found.max_abs_difference < 1e-5 * found.max_abs_reference


def test_transformer_engines_names_are_stored_and_found(tmp_path):
    """Names of ``get_gpt_layer_with_transformer_engine_submodules`` with MLA and ``qk_layernorm``:
    the latent norms and a dense layer's lie in the linear behind them."""
    release = small_release(tmp_path / "hf")
    for modules in ("local", "te"):
        import_hf(release, tmp_path / modules, ImportOptions(modules=modules))
    local, te = (MegatronSource(find_iteration(tmp_path / m)) for m in ("local", "te"))
    moved = {
        name: te.locations[name].key
        for name, where in local.locations.items()
        if te.locations[name].key != where.key
    }
    layers = [f"decoder.layers.{i}." for i in range(3)]
    layers += [f"mtp.layers.{i}.mtp_model_layer." for i in range(2)]
    stored = [name.replace("mtp_model_layer", "transformer_layer") for name in layers]
    assert moved == {
        **{
            f"{at}self_attention.{norm}_layernorm.weight": (
                f"{key}self_attention.linear_{norm}_up_proj.layer_norm_weight"
            )
            for at, key in zip(layers, stored, strict=True)
            for norm in ("q", "kv")
        },
        "decoder.layers.0.pre_mlp_layernorm.weight": (
            "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
        ),
    }
    for name in local.shapes:
        assert local.read(name).equals(te.read(name)), name


def without_predictions(directory, is_left=lambda name: False):
    """A release without tensors of prediction layers, as transformers saves it; some are left."""
    preset = dataclasses.replace(TINY, num_mtp_layers=1)
    weights = with_copies(preset, random_weights(preset))
    at = f"model.layers.{TINY.num_layers}."
    kept = {n: w for n, w in weights.items() if not n.startswith(at) or is_left(n)}
    return write_directory(directory, preset, kept)


def test_an_announced_prediction_layer_without_a_tensor_is_left_out_and_said(tmp_path, capsys):
    release = without_predictions(tmp_path / "hf")
    assert main(["audit", str(release)]) == 0
    assert main(["import", str(release), str(tmp_path / "megatron"), "--workers", "1"]) == 0
    said = "num_nextn_predict_layers=1, but no tensor of model.layers.3.* is there: taken without"
    assert capsys.readouterr().out.count(said) == 2
    saved = MegatronSource(find_iteration(tmp_path / "megatron")).args
    assert saved.mtp_num_layers is None
    export(tmp_path / "megatron", tmp_path / "back", ExportOptions())
    assert HfSource(tmp_path / "back").config["num_nextn_predict_layers"] == 0
    before, after = tensors(release), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("left", ["enorm", "self_attn.o_proj"])
def test_a_prediction_layer_with_a_part_of_its_tensors_is_refused_by_name(tmp_path, left):
    release = without_predictions(tmp_path / "hf", lambda name: left in name)
    message = r"model.layers.3.eh_proj.weight: belongs to the model, but is not in the source"
    with pytest.raises(UserError, match=message):
        import_hf(release, tmp_path / "out", ImportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
