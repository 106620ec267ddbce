"""A decoder layer's spec with adapters put beside the linears that they are asked for."""

import dataclasses
import functools
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_k2.errors import UserError
from megatron_k2.model.experts import GroupedExperts
from megatron_k2.model.lora.experts import AdaptedExperts
from megatron_k2.model.lora.linears import AdaptedColumnParallelLinear, AdaptedRowParallelLinear
from megatron_k2.model.lora.settings import ATTENTION_TARGETS, LoraSettings

_ADAPTED: dict[Any, Any] = {
    ColumnParallelLinear: AdaptedColumnParallelLinear,
    RowParallelLinear: AdaptedRowParallelLinear,
    GroupedExperts: AdaptedExperts,
}
"""A local module's class -> the same with an adapter."""

_DOWN = ("linear_q_down_proj", "linear_kv_down_proj")
"""Of attention, what ``K2SelfAttention`` builds itself: it is handed the settings."""


def with_adapters(spec: ModuleSpec, lora: LoraSettings) -> ModuleSpec:
    """A ``TransformerLayer``'s spec, of local modules, with the adapters of ``lora``.

    Raises:
        UserError: for a module that adapters are not written for.
    """
    layer: Any = spec.submodules
    attention: ModuleSpec = layer.self_attention
    linears = {
        name: _adapted(getattr(attention.submodules, name), lora)
        for name in ATTENTION_TARGETS
        if name in lora.targets and name not in _DOWN
    }
    own: Any = attention.submodules
    adapted = dataclasses.replace(
        attention,
        params={**attention.params, "lora": lora},
        submodules=dataclasses.replace(own, **linears),
    )
    return dataclasses.replace(
        spec,
        submodules=dataclasses.replace(layer, self_attention=adapted, mlp=_mlp(layer.mlp, lora)),
    )


def _adapted(kind: Any, lora: LoraSettings, **params: Any) -> ModuleSpec:
    if kind not in _ADAPTED:
        name = getattr(kind, "__name__", kind)
        raise UserError(
            f"--lora-rank: no adapter is written for {name}; take --transformer-impl local"
        )
    return ModuleSpec(_ADAPTED[kind], {"lora": lora, **params})


def _mlp(mlp: Any, lora: LoraSettings) -> Any:
    """Megatron's builder of a dense SwiGLU or of the experts, with other classes for its parts."""
    parts = mlp.keywords["submodules"]
    if isinstance(parts, MLPSubmodules):
        return _rebuilt(mlp, _swiglu(parts, "mlp", lora))
    shared = parts.shared_experts
    if shared is not None:
        inner = _swiglu(shared.keywords["submodules"], "shared_experts", lora)
        shared = _rebuilt(shared, inner)
    experts = parts.experts
    if lora.targets & {"experts.linear_fc1", "experts.linear_fc2"}:
        experts = _adapted(experts, lora)
    return _rebuilt(mlp, dataclasses.replace(parts, experts=experts, shared_experts=shared))


def _swiglu(parts: MLPSubmodules, place: str, lora: LoraSettings) -> MLPSubmodules:
    changed = {}
    if f"{place}.linear_fc1" in lora.targets:
        changed["linear_fc1"] = _adapted(parts.linear_fc1, lora, is_gate_and_up=True)
    if f"{place}.linear_fc2" in lora.targets:
        changed["linear_fc2"] = _adapted(parts.linear_fc2, lora)
    return dataclasses.replace(parts, **changed)


def _rebuilt(builder: Any, submodules: Any) -> Any:
    kept = {**builder.keywords, "submodules": submodules}
    return functools.partial(builder.func, *builder.args, **kept)
