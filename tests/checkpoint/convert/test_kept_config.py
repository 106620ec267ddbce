"""What the source's config.json says and training did not change is in the export's."""

import dataclasses
import json

import pytest
import torch

from megatron_k2.checkpoint.block_fp8 import reference
from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX, is_quantized
from megatron_k2.checkpoint.block_fp8.scales import ScaleClass
from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf.config import hf_config, without_yarn
from megatron_k2.checkpoint.hf.preset import config_like
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.stream.rows import rows_of
from megatron_k2.presets import K2_TINY
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import (
    QUANTIZATION,
    as_fp8,
    random_weights,
    write_directory,
)

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def there_and_back(tmp_path, weights, drop=(), options=None, **config):
    """Import and export a directory: config.json before and after, generation config after."""
    source = write_directory(tmp_path / "hf", TINY, weights, **config)
    (source / "generation_config.json").unlink()
    before = json.loads((source / "config.json").read_text())
    before = {key: value for key, value in before.items() if key not in drop}
    (source / "config.json").write_text(json.dumps(before))
    import_hf(source, tmp_path / "megatron", ImportOptions())
    export(tmp_path / "megatron", tmp_path / "back", options or ExportOptions())
    after, generation = (
        json.loads((tmp_path / "back" / f"{name}.json").read_text())
        for name in ("config", "generation_config")
    )
    return before, after, generation


YARN = hf_config(TINY)["rope_scaling"]
KEPT = {
    "a context cut to fit a memory": {"max_position_embeddings": 64},
    "a longer context": {"max_position_embeddings": 100_000},
    "a list of end tokens": {"eos_token_id": [7, 9], "bos_token_id": 5},
    "no begin token": {"bos_token_id": None},
    "ids beyond the vocabulary": {"eos_token_id": 163585},
    "the modern name of rope's type": {"rope_scaling": YARN | {"rope_type": "yarn"}},
}


@pytest.mark.parametrize("config", KEPT.values(), ids=KEPT)
def test_what_the_source_says_is_kept(tmp_path, config):
    before, after, generation = there_and_back(tmp_path, random_weights(TINY), **config)
    assert after == before
    assert generation["max_length"] == before["max_position_embeddings"]
    for key in ("bos_token_id", "eos_token_id"):
        assert generation.get(key) == before[key]


def test_tokens_that_the_source_does_not_name_are_no_presets(tmp_path):
    drop = ("bos_token_id", "eos_token_id")
    before, after, generation = there_and_back(tmp_path, random_weights(TINY), drop)
    assert after == before
    assert generation.keys() == {"max_length"}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_dtype_has_one_name_and_one_value(tmp_path, dtype):
    """transformers 5 writes ``dtype``; a ``torch_dtype`` beside it would contradict it."""
    _, after, _ = there_and_back(
        tmp_path,
        random_weights(TINY),
        drop=("torch_dtype",),
        options=ExportOptions(dtype=dtype),
        dtype="bfloat16",
    )
    expected = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    assert {k: v for k, v in after.items() if "dtype" in k} == {"dtype": expected}


def test_a_run_that_changes_the_positions_says_its_own():
    template = hf_config(K2_TINY) | {"max_position_embeddings": 2048}
    longer = dataclasses.replace(
        K2_TINY,
        yarn=dataclasses.replace(K2_TINY.yarn, rotary_scaling_factor=32.0),
        max_position_embeddings=8192,
    )
    said = config_like(template, longer, model_type=None, dtype="bf16")
    assert (said["max_position_embeddings"], said["rope_scaling"]["factor"]) == (8192, 32.0)
    plain = without_yarn(K2_TINY)
    template = hf_config(plain) | {"max_position_embeddings": 2048}
    for trained_at, expected in ((256, 2048), (4096, 4096)):
        run = dataclasses.replace(plain, max_position_embeddings=trained_at)
        said = config_like(template, run, model_type=None, dtype="bf16")
        assert said["max_position_embeddings"] == expected


def test_modules_left_alone_stay_so_and_the_keys_say_it(tmp_path):
    listed = ["lm_head", O_PROJ.removesuffix(".weight"), r"model.layers.2\.mlp.experts"]
    weights = as_fp8(random_weights(TINY))
    wide = random_weights(TINY)
    kept = [n for n in wide if n == O_PROJ or n.startswith("model.layers.2.mlp.experts.")]
    for name in kept:
        weights[name] = wide[name]
        del weights[name + SCALE_SUFFIX]
    before, after, _ = there_and_back(
        tmp_path,
        weights,
        options=ExportOptions(dtype="fp8"),
        quantization_config=QUANTIZATION | {"modules_to_not_convert": listed},
    )
    back = HfSource(tmp_path / "back").stored
    assert len(kept) > 10
    assert after == before
    assert {name for name in wide if str(back[name].dtype) == "float8_e4m3fn"} == {
        name for name in wide if is_quantized(name) and name not in kept
    }


def power_of_two(scales):
    return torch.equal(torch.exp2(torch.log2(scales).round()), scales)


@pytest.mark.parametrize("has_compiler", [True, False])
def test_scales_stay_powers_of_two_where_training_moved_the_weights(
    tmp_path, monkeypatch, has_compiler
):
    """``scale_fmt`` ue8m0: a fresh scale is the smallest power of two that no code saturates by."""
    if not has_compiler:
        monkeypatch.setattr("megatron_k2.fp8.native.library", lambda: None)
    weights = random_weights(TINY)
    named = QUANTIZATION | {"scale_fmt": "ue8m0"}
    _, after, _ = there_and_back(
        tmp_path, weights, options=ExportOptions(dtype="fp8"), quantization_config=named
    )
    assert after["quantization_config"] == named
    back = HfSource(tmp_path / "back")
    for name in filter(is_quantized, weights):
        scales = back.read(name + SCALE_SUFFIX).tensor()
        amax = weights[name].float().abs().max()
        assert power_of_two(scales), name
        assert amax / 448 <= scales.item() < 2 * amax / 448
        codes = (weights[name].float() / scales.item()).to(reference.E4M3)
        assert back.read(name).equals(rows_of(codes)), name


def test_without_the_key_scales_are_not_powers_of_two(tmp_path):
    options = ExportOptions(dtype="fp8")
    _, after, _ = there_and_back(tmp_path, random_weights(TINY), options=options)
    assert after["quantization_config"] == QUANTIZATION
    back = HfSource(tmp_path / "back")
    assert not power_of_two(back.read(O_PROJ + SCALE_SUFFIX).tensor())


def test_untouched_powers_of_two_come_back_with_their_key(tmp_path):
    weights = as_fp8(random_weights(TINY), ScaleClass.OTHER)
    named = QUANTIZATION | {"scale_fmt": "ue8m0"}
    before, after, _ = there_and_back(
        tmp_path, weights, options=ExportOptions(dtype="fp8"), quantization_config=named
    )
    assert after == before
    back = HfSource(tmp_path / "back")
    assert all(back.read(name).equals(rows_of(tensor)) for name, tensor in weights.items())
