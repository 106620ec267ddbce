"""Two checkpoints of either kind by their logits: each run by its own side's code.

A Megatron checkpoint runs in Megatron (one rank, ``engine.mcore``), a Hugging Face
directory in transformers. Weights are what lies on the disk, widened; FP8 is dequantised to bf16
first, as an import does, so a checkpoint and its FP8 source agree.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.hf.preset import preset_from_hf
from megatron_k2.checkpoint.hf.reader import HfSource, is_hf_directory
from megatron_k2.checkpoint.names.rules import GATE_OVER_UP
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.checkpoint.verify.against_reference import LogitComparison, compare_outputs
from megatron_k2.checkpoint.verify.compare import HfWeights
from megatron_k2.errors import UserError
from megatron_k2.run.iterations import find_iteration

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare_logits(
    a: Path,
    b: Path,
    *,
    dtype: str = "fp32",
    num_sequences: int = 2,
    seq_length: int = 32,
    seed: int = 0,
) -> LogitComparison:
    """Logits of A against those of B on random tokens.

    Args:
        a: Hugging Face directory or Megatron ``--save`` directory.
        b: the same; its logits are the reference.
        dtype: to compute in, ``fp32`` or ``bf16``.
        num_sequences: to run.
        seq_length: tokens of each.
        seed: of the tokens.

    Raises:
        UserError: if the vocabularies differ.
    """
    sizes = [_vocabulary(directory) for directory in (a, b)]
    if sizes[0] != sizes[1]:
        raise UserError(f"--logits: A has {sizes[0]} ids, B has {sizes[1]}; not the same model")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, sizes[0], (num_sequences, seq_length), generator=generator)
    return compare_outputs(logits_of(a, tokens, dtype), logits_of(b, tokens, dtype))


def _vocabulary(directory: Path) -> int:
    if is_hf_directory(directory):
        return int(HfSource(directory).config["vocab_size"])
    saved = MegatronSource(find_iteration(directory)).args
    if saved is None:
        raise UserError(f"{directory} saved no arguments, so its model cannot be run")
    return int(saved.vocab_size)


def logits_of(directory: Path, tokens: Tensor, dtype: str = "fp32") -> Tensor:
    """Logits [b, s, V] fp32 of tokens [b, s], by the code of the checkpoint's own side."""
    if is_hf_directory(directory):
        return _transformers_logits(HfSource(directory), tokens, DTYPES[dtype])
    return _megatron_logits(directory, tokens, DTYPES[dtype])


def _transformers_logits(source: HfSource, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    preset = preset_from_hf(source.config)
    settings = source.config | hf_config(preset, model_type="deepseek_v3", dtype="fp32")
    settings |= {k: source.config[k] for k in ("n_group", "topk_group") if k in source.config}
    settings.pop("quantization_config", None)
    config = DeepseekV3Config.from_dict(settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # its grouped product wants rows of whole 16 bytes
    model = DeepseekV3ForCausalLM(config).eval()
    model.load_state_dict(dict(_fused_state(HfWeights(source), list(model.state_dict()))))
    if dtype != torch.float32:
        for parameter in model.parameters():  # buffers (router bias, rotary) stay fp32, as trained
            parameter.data = parameter.data.to(dtype)
    with torch.inference_mode():
        return model(tokens).logits.float()


def _fused_state(weights: HfWeights, names: list[str]) -> list[tuple[str, Tensor]]:
    """State of transformers 5's model, which has a layer's experts in two tensors."""

    def whole(name: str) -> Tensor:
        if name not in weights.shapes:
            raise UserError(f"'{name}' belongs to the model, but is not in the checkpoint")
        return weights.values(name, slice(0, weights.shapes[name][0])).float()

    state: list[tuple[str, Tensor]] = []
    for name in names:
        prefix, is_fused, matrix = name.rpartition("mlp.experts.")
        if not is_fused or matrix not in ("gate_up_proj", "down_proj"):
            state.append((name, whole(name)))
            continue
        num_experts = sum(n.startswith(f"{prefix}mlp.experts.") for n in weights.shapes) // 3
        experts = [f"{prefix}mlp.experts.{i}." for i in range(num_experts)]
        if matrix == "down_proj":
            parts = [whole(f"{at}down_proj.weight") for at in experts]
        else:
            parts = [
                GATE_OVER_UP.join([whole(f"{at}{half}_proj.weight") for half in ("gate", "up")])
                for at in experts
            ]
        state.append((name, torch.stack(parts)))
    return state


def _megatron_logits(directory: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    from megatron_k2.engine.mcore.ranks import opened_model, process_group
    from megatron_k2.engine.mcore.saved_args import read_saved_args
    from megatron_k2.parallel.layout import Layout

    iteration, saved = read_saved_args(directory, None)
    args = copy.copy(saved)
    args.bf16, args.fp16, args.params_dtype = dtype == torch.bfloat16, False, dtype
    args.mtp_num_layers = None  # prediction layers do not reach the next token's logits
    with process_group() as device, opened_model(iteration, args, Layout()) as model:
        return model.whole_logits(tokens.to(device)).cpu()
