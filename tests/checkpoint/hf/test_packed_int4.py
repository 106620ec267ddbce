"""int4 of compressed-tensors against the format's definition, written out integer by integer.

Bit for bit: a weight is one rounding of an exact product. The packing below is the definition's own
(``pack_to_int32``); that the package itself agrees was seen once by hand, it is no dependency.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf.packed_int4 import group_size_of, unpacked
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.hf.release import open_release
from megatron_k2.checkpoint.stream.rows import rows_of
from megatron_k2.checkpoint.verify.compare import compare, open_weights
from megatron_k2.checkpoint.verify.inspect import inspect_checkpoint
from megatron_k2.engine.mcore.compare_logits import compare_logits
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import QUANTIZATION, random_weights, write_directory

GROUP = 32
PRESET = dataclasses.replace(TINY, hidden_size=64, moe_ffn_hidden_size=32, num_layers=2)
WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "strategy": "group",
    "group_size": GROUP,
    "symmetric": True,
    "actorder": None,
    "dynamic": False,
    "block_structure": None,
    "observer": "minmax",
    "observer_kwargs": {},
}
SECTION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": WEIGHTS,
        }
    },
}
"""As K2-Thinking has it."""


def _integers_and_scales(out, columns, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-8, 8, (out, columns), generator=generator)
    integers[0, :16] = torch.arange(-8, 8)
    scales = (torch.rand(out, columns // GROUP, generator=generator) * 0.02 + 1e-3).to(dtype)
    return integers, scales


def _packed(integers, order=range(8), offset=8):
    """Eight to a word, the first in the lowest bits."""
    words = np.zeros((integers.shape[0], integers.shape[1] // 8), np.uint32)
    for row, line in enumerate(integers.tolist()):
        for column, integer in enumerate(line):
            bits = (integer + offset) & 15
            words[row, column // 8] |= np.uint32(bits << 4 * order[column % 8])
    return torch.from_numpy(words.view(np.int32))


def _meant(integers, scales, group=GROUP):
    """Each integer by the scale of its columns, in torch's arithmetic of the scale's dtype."""
    rows = [
        [
            torch.tensor(float(integer)).to(scales.dtype) * scales[row, column // group]
            for column, integer in enumerate(line)
        ]
        for row, line in enumerate(integers.tolist())
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_integer_by_its_scale(dtype):
    integers, scales = _integers_and_scales(5, 96, dtype=dtype)
    found = unpacked(rows_of(_packed(integers)), rows_of(scales), GROUP)
    assert torch.equal(found.tensor(), _meant(integers, scales))


@pytest.mark.parametrize(
    "wrong", [{"order": range(7, -1, -1)}, {"offset": 0}], ids=["first highest", "two's complement"]
)
def test_another_packing_is_another_weight(wrong):
    integers, scales = _integers_and_scales(5, 96)
    found = unpacked(rows_of(_packed(integers, **wrong)), rows_of(scales), GROUP).tensor()
    assert (found != _meant(integers, scales)).float().mean() > 0.5


@pytest.fixture
def release(tmp_path):
    """(directory, the weights that it means)."""
    weights, meant = {}, {}
    for number, (name, weight) in enumerate(random_weights(PRESET).items()):
        if ".mlp.experts." not in name:
            weights[name] = meant[name] = weight
            continue
        integers, scales = _integers_and_scales(*weight.shape, seed=number)
        at = name.removesuffix("weight")
        weights[f"{at}weight_packed"] = _packed(integers)
        weights[f"{at}weight_scale"] = scales
        weights[f"{at}weight_shape"] = torch.tensor(weight.shape, dtype=torch.int32)
        meant[name] = integers.to(scales.dtype) * scales.repeat_interleave(GROUP, 1)
    return write_directory(tmp_path / "hf", PRESET, weights, quantization_config=SECTION), meant


def test_a_release_is_imported_as_what_it_means_and_exported_in_bf16(release, tmp_path):
    directory, meant = release
    result = import_hf(directory, tmp_path / "megatron", ImportOptions())
    assert result.notes == ("12 weights in int4, groups of 32: dequantised",)
    plain = write_directory(tmp_path / "plain", PRESET, meant)
    assert compare(open_weights(tmp_path / "megatron"), open_weights(plain)).is_equal
    assert compare(open_weights(directory), open_weights(plain)).is_equal
    export(tmp_path / "megatron", tmp_path / "back", ExportOptions())
    assert compare(open_weights(tmp_path / "back"), open_weights(plain)).is_equal
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    export(tmp_path / "megatron", tmp_path / "fp8", ExportOptions(dtype="fp8"))
    said = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert said == QUANTIZATION
    found = compare_logits(tmp_path / "megatron", directory)
    assert found.max_abs_difference < 1e-5 * found.max_abs_reference


def test_rows_are_those_of_the_whole_and_inspect_shows_what_lies_there(release):
    directory, meant = release
    source, name = open_release(directory).source, "model.layers.1.mlp.experts.2.up_proj.weight"
    assert torch.equal(source.read(name, slice(3, 9)).tensor(), meant[name][3:9])
    found = {group.pattern: group for group in inspect_checkpoint(directory).groups}
    packed = found["model.layers.*.mlp.experts.*.up_proj.weight_packed"]
    assert packed.shapes == ((32, 8),)
    assert packed.dtypes == ("int32",)


def _changed(key, value):
    section = json.loads(json.dumps(SECTION))
    *parts, last = key.split(".")
    place = section
    for part in parts:
        place = place[part]
    place[last] = value
    return section


AT = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "int-quantized"),
        ("format", None),
        (f"{AT}.num_bits", 8),
        (f"{AT}.symmetric", False),
        (f"{AT}.symmetric", 1),
        (f"{AT}.type", "float"),
        (f"{AT}.strategy", "channel"),
        (f"{AT}.actorder", "group"),
        (f"{AT}.group_size", 12),
        (f"{AT}.group_size", -1),
        (f"{AT}.group_size", "32"),
        (f"{AT}.unheard_of", 1),
        ("config_groups.group_0.input_activations", {"num_bits": 8}),
        ("config_groups.group_0.weights", None),
        ("config_groups.group_0", []),
        ("config_groups", {}),
        ("kv_cache_scheme", {"num_bits": 8}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
        ("unheard_of", 1),
    ],
)
def test_what_is_not_read_is_refused_by_its_key(key, value):
    assert group_size_of(SECTION) == GROUP
    with pytest.raises(UserError, match=rf"{key.split('.')[-1]}=.*dequantise it to bf16 first"):
        group_size_of(_changed(key, value))


def test_groups_of_two_sizes_are_refused():
    other = {"targets": ["Linear"], "weights": WEIGHTS | {"group_size": 64}}
    with pytest.raises(UserError, match=r"group_size=\[32, 64\]"):
        group_size_of(_changed("config_groups.group_1", other))


@pytest.mark.parametrize(
    ("suffix", "tensor", "said"),
    [
        ("weight_scale", None, "but its scales .* are missing"),
        ("weight_scale", torch.ones(32, 4).bfloat16(), r"packed int32 \[32, 8\] with scales"),
        ("weight_scale", torch.ones(32, 2, dtype=torch.int32), "the second, a float"),
        ("weight_packed", torch.zeros(32, 8, dtype=torch.int64), "packed int64"),
        ("weight_packed", torch.zeros(256, dtype=torch.int32), r"packed int32 \[256\]"),
        ("weight_shape", torch.tensor([32, 63]), r"weight_shape' says \[32, 63\]"),
    ],
)
def test_parts_that_do_not_go_together_are_named(release, tmp_path, suffix, tensor, said):
    directory, _ = release
    name = f"model.layers.1.mlp.experts.0.up_proj.{suffix}"
    raw = HfSource(directory, files=["model-2-of-2.safetensors"])
    weights = {
        stored: raw._read(entry, slice(None), is_computed=True).tensor()
        for stored, entry in _all_parts(raw)
    }
    weights.pop(name)
    weights |= {} if tensor is None else {name: tensor}
    broken = write_directory(tmp_path / "broken", PRESET, weights, quantization_config=SECTION)
    with pytest.raises(UserError, match=said):
        HfSource(broken, files=[_file_of(broken)]).read(
            "model.layers.1.mlp.experts.0.up_proj.weight"
        )


def _file_of(directory):
    return next(path.name for path in directory.glob("*.safetensors"))


def _all_parts(source):
    for name, entry in source.stored.items():
        if (weight := source.packed.get(name)) is None:
            yield name, entry
            continue
        at = name.removesuffix(".weight")
        for suffix in ("packed", "scale", "shape"):
            yield f"{at}.weight_{suffix}", getattr(weight, suffix)
