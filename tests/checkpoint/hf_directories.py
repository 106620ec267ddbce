"""Hugging Face directories of random weights, as a release lies on disk."""

import json

import torch

from megatron_k2.checkpoint.block_fp8 import reference
from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX, is_quantized
from megatron_k2.checkpoint.block_fp8.scales import ScaleClass
from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.hf.writer import TensorSlot, write_safetensors
from megatron_k2.checkpoint.names.audit import released_shapes
from megatron_k2.checkpoint.stream.rows import rows_of

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def random_weights(preset, dtype=torch.bfloat16, seed=0):
    """Names in the release's order; a wide router bias, norms away from 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in released_shapes(preset).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.2 * noise
        elif name.endswith("e_score_correction_bias"):
            weights[name] = 0.02 * noise
            continue
        else:
            noise = noise * shape[-1] ** -0.5
        weights[name] = noise.to(dtype)
    return weights


def as_fp8(weights, kind=ScaleClass.BF16_AMAX):
    """Quantised as a release is, with scales made in one of three ways."""
    result = {}
    for name, weight in weights.items():
        if not is_quantized(name):
            result[name] = weight
            continue
        if kind is ScaleClass.FP32_AMAX:
            weight = weight.float() * 1.001  # off the bf16 grid
        codes, scales = reference.quantize(weight)
        if kind is ScaleClass.OTHER:
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
            wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            wide = wide[: weight.shape[0], : weight.shape[1]]
            codes = (weight.float() / wide).to(reference.E4M3)
        result |= {name: codes, name + SCALE_SUFFIX: scales}
    return result


def write_directory(directory, preset, weights, *, leftovers=False, **config):
    """Shards of one layer, index, config with a field of its own, tokenizer files."""
    directory.mkdir(parents=True)
    shards = {}
    for name, tensor in weights.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        shards.setdefault(f"model-{layer + 1}-of-{preset.num_layers}.safetensors", {})[name] = (
            tensor
        )
    if leftovers:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        shards[f"model-1-of-{preset.num_layers}.safetensors"][name] = torch.ones(7).bfloat16()
    for file, tensors in shards.items():
        rows = {name: rows_of(tensor) for name, tensor in tensors.items()}
        slots = [TensorSlot(name, row.shape, row.dtype) for name, row in rows.items()]
        write_safetensors(directory / file, slots, rows.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    is_fp8 = any(tensor.dtype == reference.E4M3 for tensor in weights.values())
    settings = hf_config(preset) | {"ep_size": 1, "unsloth_version": "kept"}
    settings |= ({"quantization_config": QUANTIZATION} if is_fp8 else {}) | config
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "modeling_deepseek.py").write_text("raise SystemExit('is copied, never run')")
    (directory / "LICENSE").write_text("of the release")
    return directory
