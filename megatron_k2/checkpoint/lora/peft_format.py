"""Adapters as PEFT keeps them for transformers 5's ``DeepseekV3ForCausalLM``.

``adapter_config.json`` beside ``adapter_model.safetensors``, of which PEFT 0.21 expects:

- linears of attention by their module, ``base_model.model.<module>.lora_A.weight``;
- gate, up and down of dense layers and shared experts as ``target_parameters``, by the parameter:
  of a module whose name ends in ``gate_proj`` PEFT assumes that it is an expert's, fused since
  transformers 5, and drops it from ``target_modules`` (``transformers_weight_conversion``);
- a layer's routed experts as two parameters of one module, ``experts.gate_up_proj`` [e, 2F, H] and
  ``experts.down_proj`` [e, H, F]. The second wraps the first, which so is ``experts.base_layer``
  where both are there. A's of the experts lie one above the other, [e · rank, in]; B's columns go
  rank by rank, [out, rank · e], experts innermost.

vLLM takes experts apart, ``experts.<i>.{gate,up,down}_proj``, A repeated for gate and up.
"""

from typing import TYPE_CHECKING, Any

from megatron_k2.checkpoint.lora.adapters import LORA_A, LORA_B, AdapterSource, linear_of
from megatron_k2.checkpoint.names.mapping import Pair

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PARAMETERS = {"gate_proj": "gate_up_proj", "down_proj": "down_proj"}


def module_of(hf_name: str) -> str:
    """The module of a weight."""
    return hf_name.removesuffix(".weight")


def _is_linear_module(module: str) -> bool:
    """Whether PEFT may be given it as a module; gate, up and down go by their parameter."""
    return ".self_attn." in module


def peft_config(adapters: AdapterSource, pairs: list[Pair]) -> dict[str, Any]:
    """Content of ``adapter_config.json``."""
    modules: set[str] = set()
    parameters: set[str] = set()
    for pair in pairs:
        if not adapters.has(pair):
            continue
        for name in pair.hf:
            module = module_of(name)
            _, _, within = module.partition(".layers.")
            tail = within.partition(".")[2]
            if pair.expert is not None:
                leaf = _PARAMETERS.get(tail.rpartition(".")[2])
                parameters |= {f"mlp.experts.{leaf}"} if leaf else set()
            elif _is_linear_module(module):
                modules.add(tail.rpartition(".")[2])
            else:
                parameters.add(f"{tail}.weight")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def expert_prefix(layer: int, *, is_inner: bool) -> str:
    """What the factors of a layer's routed experts are named by; the inner one is wrapped."""
    wrapped = "base_layer." if is_inner else ""
    return f"{PREFIX}model.layers.{layer}.mlp.experts.{wrapped}"


def peft_tensors(adapters: AdapterSource, pairs: list[Pair]) -> "dict[str, Tensor]":
    """Content of ``adapter_model.safetensors``, fp32."""
    found: dict[str, Tensor] = {}
    experts: dict[tuple[int, bool], list[Pair]] = {}
    for pair in pairs:
        if not adapters.has(pair):
            continue
        if pair.expert is not None:
            experts.setdefault((pair.layer, len(pair.hf) == 2), []).append(pair)
            continue
        for name, part in zip(pair.hf, adapters.factors(pair), strict=True):
            found[f"{PREFIX}{module_of(name)}.lora_A.weight"] = part.a.contiguous()
            found[f"{PREFIX}{module_of(name)}.lora_B.weight"] = part.b.contiguous()
    for (layer, is_fc1), members in experts.items():
        at = expert_prefix(layer, is_inner=is_fc1 and (layer, False) in experts)
        a, b = _stacked(adapters, members)
        found[f"{at}lora_A.weight"], found[f"{at}lora_B.weight"] = a, b
    return found


def _stacked(adapters: AdapterSource, members: list[Pair]) -> "tuple[Tensor, Tensor]":
    """[e · rank, in] and [out, rank · e] of a layer's experts."""
    import torch

    names = [linear_of(pair) for pair in sorted(members, key=lambda pair: pair.expert or 0)]
    a = torch.cat([adapters.tensor(f"{name}{LORA_A}") for name in names])
    b = torch.stack([adapters.tensor(f"{name}{LORA_B}") for name in names])
    return a, b.permute(1, 2, 0).flatten(1).contiguous()
