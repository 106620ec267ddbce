"""An adapter of PEFT's under Megatron's names, as ``peft_format`` describes its files.

PEFT lets every linear have its own rank and alpha (``rank_pattern``, ``alpha_pattern``), and itself
doubles both where it fuses an adapter of separate gate and up projections into the experts' one.
Here a model has one of each: the largest rank is everybody's, smaller ones are filled up with
columns of B that are zero, and what a linear's scale differs by goes into its B. The function is
the same; what was filled up begins like a fresh adapter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_k2.checkpoint.lora.adapters import LORA_A, LORA_B, linear_of
from megatron_k2.checkpoint.lora.peft_format import PREFIX, expert_prefix, module_of
from megatron_k2.checkpoint.names.mapping import Pair
from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_UNSUPPORTED = {
    "use_dora": "DoRA scales each row by a learned length",
    "lora_bias": "its B has a bias",
    "fan_in_fan_out": "its weights are transposed",
    "modules_to_save": "it replaces whole modules",
    "layer_replication": "it repeats layers",
}
"""Settings of PEFT that no adapter here stands for -> why."""


@dataclass(frozen=True)
class Imported:
    """Adapters of one rank and scale."""

    rank: int
    alpha: float
    tensors: "dict[str, Tensor]" = field(repr=False)
    """Name within ``GPTModel.state_dict()`` -> tensor; a routed expert's are its own."""


@dataclass(frozen=True)
class _Found:
    """One linear's factors as they were stored."""

    a: "tuple[Tensor, ...]"
    """One for each A: two where gate and up were trained apart; [rank, in] each."""
    b: "tuple[Tensor, ...]"
    """As many; [out, rank]."""
    scale: float


def check_config(config: dict[str, Any]) -> None:
    """Refuse what is no plain LoRA.

    Raises:
        UserError: naming the setting.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type {config.get('peft_type')!r}: expected LORA")
    for name, reason in _UNSUPPORTED.items():
        if config.get(name):
            raise UserError(f"{name} {config[name]!r}: {reason}; only plain LoRA can be imported")
    if config.get("bias", "none") != "none":
        raise UserError(f"bias {config['bias']!r}: the model has none; expected 'none'")


def megatron_adapters(
    tensors: "Mapping[str, Tensor]", config: dict[str, Any], pairs: list[Pair]
) -> Imported:
    """What PEFT saved, under Megatron's names.

    Args:
        tensors: of ``adapter_model.safetensors``.
        config: ``adapter_config.json``.
        pairs: of the model's weights.

    Raises:
        UserError: for a setting that cannot be represented, a tensor without a place, or a linear
            of which a part is missing.
    """
    check_config(config)
    left = dict(tensors)
    found: dict[str, _Found] = {}
    experts: dict[tuple[int, bool], list[Pair]] = {}
    for pair in pairs:
        if pair.expert is not None:
            experts.setdefault((pair.layer, len(pair.hf) == 2), []).append(pair)
        elif (one := _linear(left, pair, config)) is not None:
            found[linear_of(pair)] = one
    for (layer, is_fc1), members in experts.items():
        found.update(_experts(left, layer, members, config, is_fc1=is_fc1))
    if left:
        first = ", ".join(sorted(left)[:3])
        raise UserError(f"{len(left)} tensors of the adapter have no place in the model: {first}")
    if not found:
        raise UserError("the adapter holds no tensor")
    return _of_one_rank(found)


def _of_one_rank(found: dict[str, _Found]) -> Imported:
    import torch

    rank = max(a.shape[0] for one in found.values() for a in one.a)
    scale = next(iter(found.values())).scale
    result: dict[str, Tensor] = {}
    for linear, one in found.items():
        a = [_filled(part, rank) for part in one.a]
        b = [torch.nn.functional.pad(part, (0, rank - part.shape[1])) for part in one.b]
        if one.scale != scale:
            b = [part * (one.scale / scale) for part in b]
        result[f"{linear}{LORA_A}"] = torch.cat(a).contiguous()
        result[f"{linear}{LORA_B}"] = torch.cat(b).contiguous()
    return Imported(rank, scale * rank, result)


def _filled(a: "Tensor", rank: int) -> "Tensor":
    """A with rows up to ``rank`` that are drawn as a fresh adapter's, the same every time."""
    import torch

    missing, width = rank - a.shape[0], a.shape[1]
    generator = torch.Generator().manual_seed(0)
    more = torch.empty(missing, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
    return torch.cat([a, more.to(a.dtype)])


def _setting(config: dict[str, Any], pattern: str, default: str, name: str) -> float:
    """A linear's rank or alpha: of the pattern that its name ends with, else everybody's."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return float(value)
    return float(config[default])


def _scale(config: dict[str, Any], name: str) -> float:
    rank = _setting(config, "rank_pattern", "r", name)
    alpha = _setting(config, "alpha_pattern", "lora_alpha", name)
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _linear(left: "dict[str, Tensor]", pair: Pair, config: dict[str, Any]) -> _Found | None:
    names = [f"{PREFIX}{module_of(name)}.lora_" for name in pair.hf]
    present = [name for name in names if f"{name}A.weight" in left]
    if not present:
        return None
    if len(present) < len(names):
        missing = next(name for name in names if name not in present)
        raise UserError(
            f"the adapter has {present[0]}A.weight but not {missing}A.weight: gate and up are one "
            "linear here; train both or neither"
        )
    scales = {_scale(config, module_of(name)) for name in pair.hf}
    if len(scales) > 1:
        raise UserError(f"{pair.hf[0]} and {pair.hf[1]} have two scales, {sorted(scales)}")
    a = tuple(_taken(left, f"{name}A.weight") for name in names)
    b = tuple(_taken(left, f"{name}B.weight") for name in names)
    for part, name, shape in zip(b, pair.hf, pair.hf_shapes, strict=True):
        if part.shape[0] != shape[0]:
            raise UserError(f"{name}: its B has {part.shape[0]} rows, the weight {shape[0]}")
    return _Found(a, b, scales.pop())


def _taken(left: "dict[str, Tensor]", name: str) -> "Tensor":
    if name not in left:
        raise UserError(f"the adapter lacks {name}")
    return left.pop(name).float()


def _experts(
    left: "dict[str, Tensor]",
    layer: int,
    members: list[Pair],
    config: dict[str, Any],
    *,
    is_fc1: bool,
) -> dict[str, _Found]:
    rows = members[0].megatron_shape[0]
    at = _place_of_experts(left, layer, members[0].megatron_shape, is_fc1=is_fc1)
    if at is None:
        return {}
    name = f"model.layers.{layer}.mlp.experts.{'gate_up_proj' if is_fc1 else 'down_proj'}"
    a, b = _taken(left, f"{at}lora_A.weight"), _taken(left, f"{at}lora_B.weight")
    num = len(members)
    if a.shape[0] % num or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{at}lora_A.weight has {a.shape[0]} rows and B {b.shape[1]} columns: expected the "
            f"same multiple of {num} experts"
        )
    inner, outer = a.chunk(num), b.view(rows, -1, num).permute(2, 0, 1)
    scale = _scale(config, name)
    return {
        linear_of(pair): _Found((inner[i],), (outer[i].contiguous(),), scale)
        for i, pair in enumerate(sorted(members, key=lambda pair: pair.expert or 0))
    }


def _place_of_experts(
    left: "dict[str, Tensor]", layer: int, shape: tuple[int, ...], *, is_fc1: bool
) -> str | None:
    """The prefix of their factors; where only one of the two is there it is not wrapped."""
    inner, outer = (expert_prefix(layer, is_inner=is_inner) for is_inner in (True, False))
    if f"{inner}lora_A.weight" in left:
        return inner if is_fc1 else outer
    a, b = left.get(f"{outer}lora_A.weight"), left.get(f"{outer}lora_B.weight")
    if a is None or b is None or (b.shape[0], a.shape[1]) != shape:
        return None
    return outer
