"""Random models for the embedded engine's tests, and transformers' own of the same weights."""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

from megatron_k2.checkpoint.hf.config import hf_config, without_yarn
from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.local.weights import Weights
from megatron_k2.presets import YarnScaling
from tests.support.shapes import SMALL

TINY = replace(SMALL, moe_ffn_hidden_size=24, yarn=YarnScaling(8.0, 32, 1.0, 1.0, 1.0, 0.5))
"""Experts as wide as ``grouped_mm`` takes in bf16; the two factors of YaRN apart."""
SHAPES = {
    "k2": TINY,
    "no query latent": replace(TINY, q_lora_rank=None, num_shared_experts=2),
    "odd experts": SMALL,
    "no YaRN": without_yarn(TINY),
    "prediction layer announced": replace(TINY, num_mtp_layers=1),
}


def reference(preset, seed=0, groups=(1, 1)):
    """transformers' model with weights far from their initial values, fp32."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**hf_config(preset, model_type="deepseek_v3"))
    config.n_group, config.topk_group = groups
    config._attn_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            drawn = torch.randn(value.shape, generator=generator)
            is_norm = value.dim() == 1 and "bias" not in name
            value.copy_(1 + 0.3 * drawn if is_norm else 0.12 * drawn)
    return model


def weights_of(model, preset, dtype=torch.float32, device="cpu", groups=(1, 1)):
    """The engine's, read from transformers' model."""
    found = Weights(preset, dtype, torch.device(device), groups)
    found.load(classic_from_transformers(model.state_dict()).items())
    return found


def saved(model, preset, folder):
    """The same as a Hugging Face directory, without a tokenizer."""
    named = classic_from_transformers(model.state_dict())
    save_file({k: v.contiguous() for k, v in named.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(preset, model_type="deepseek_v3")))
    return folder


def tokens(count, seed=0, vocab_size=TINY.vocab_size):
    """Random ids, a list."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()
