"""A Hugging Face directory of random weights at any size, written a tensor at a time.

python benchmarks/generated_release.py DIR [--preset k2-tiny] [--fp8]
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_k2.checkpoint.block_fp8 import reference
from megatron_k2.checkpoint.block_fp8.layout import (
    QUANTIZATION_CONFIG,
    SCALE_SUFFIX,
    is_quantized,
    scale_shape,
)
from megatron_k2.checkpoint.block_fp8.scales import E4M3_MAX
from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.hf.writer import TensorSlot, write_safetensors
from megatron_k2.checkpoint.names.audit import released_shapes
from megatron_k2.checkpoint.stream.rows import Dtype, Rows, rows_of
from megatron_k2.presets import PRESETS, ModelPreset

SHARD = "model.safetensors"
ONE = 0x3F80
"""In bf16."""
STEP = 100_003
"""From where one tensor's numbers begin to where the next one's do."""


def generate(directory: Path, preset: ModelPreset, *, is_fp8: bool) -> int:
    """Write ``directory``; one random block of numbers is repeated. Returns bytes of tensors.

    ``model_type`` is ``deepseek_v3``, by which transformers and Bridge know the architecture.
    """
    directory.mkdir()
    slots = []
    for name, shape in released_shapes(preset).items():
        is_bias = name.endswith("e_score_correction_bias")
        dtype = Dtype.FP32 if is_bias else Dtype.BF16
        if is_fp8 and is_quantized(name):
            dtype = Dtype.E4M3
            scales = TensorSlot(name + SCALE_SUFFIX, scale_shape(shape), Dtype.FP32)
            slots.append(scales)
        slots.append(TensorSlot(name, shape, dtype))
    slots.sort(key=lambda slot: -slot.dtype.itemsize)
    config = hf_config(preset, model_type="deepseek_v3")
    if is_fp8:
        config["quantization_config"] = QUANTIZATION_CONFIG
    (directory / "config.json").write_text(json.dumps(config))
    return write_safetensors(directory / SHARD, slots, _tensors(slots))


def _tensors(slots: list[TensorSlot]) -> Iterator[Rows]:
    noise = (torch.randn(4 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    codes = (noise.float() * (E4M3_MAX / noise.float().abs().max())).to(reference.E4M3)
    for i, slot in enumerate(slots):
        if slot.dtype is Dtype.FP32:
            yield Rows(np.full(slot.shape, 1e-4, np.float32), slot.dtype)
        elif "norm" in slot.name:
            yield Rows(np.full(slot.shape, ONE, np.uint16), slot.dtype)
        else:
            block = rows_of(codes if slot.dtype is Dtype.E4M3 else noise).bits
            yield Rows(np.resize(block[i * STEP % len(block) :], slot.shape), slot.dtype)


def give_a_tokenizer(directory: Path) -> None:
    """A word-level one of a hundred words: Bridge refuses to save without any."""
    words = {f"word{i}": i for i in range(100)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "word0"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "word0"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="k2-tiny")
    parser.add_argument("--fp8", action="store_true", help="block FP8, as K2's release")
    arguments = parser.parse_args()
    generate(arguments.directory, PRESETS[arguments.preset], is_fp8=arguments.fp8)


if __name__ == "__main__":
    main()
