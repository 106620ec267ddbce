"""Which activations Megatron's fine-grained offload moves to the host, group by group.

Its groups bracket modules (``--offload-modules``); what one saves goes together. Of a chunk's
groups, in the forward's order, ``--activation-offload-fraction`` keeps the last on the device,
counted in groups (``core/pipeline_parallel/fine_grained_activation_offload.py``), while the planner
counts bytes. What is stored in FP8 goes as codes and scales (``fp8/offload.py``).
"""

import functools
from dataclasses import dataclass
from typing import get_args

from megatron_k2.planning.cost.activations import attention_rows, kept_bytes, layer_bytes, mlp_rows
from megatron_k2.planning.cost.kept import OffloadModule
from megatron_k2.planning.request import Recompute, RunRequest
from megatron_k2.presets import ModelPreset


def offload_modules(recompute: frozenset[Recompute]) -> tuple[OffloadModule, ...]:
    """Megatron's groups that a run with ``recompute`` offloads, in the forward's order.

    Not the core attention's where queries, keys and values are computed again: its group would copy
    them to the host and back all the same. The projection's, which alone lets go of the attention's
    output, Megatron allows only together with it.
    """
    attention = {"core_attn", "attn_proj"} if "mla_up" in recompute else set()
    return tuple(name for name in get_args(OffloadModule) if name not in attention)


@dataclass(frozen=True)
class Group:
    """What one module of one layer saves, in bytes a token."""

    module: OffloadModule
    off_device: float
    to_host: float
    """More, where another group hands over the same tensor too."""


def layer_groups(
    p: ModelPreset, tp: int, recompute: frozenset[Recompute], *, is_moe: bool, fp8_storage: bool
) -> list[Group]:
    """Savings of each module of one layer with Transformer Engine, but for empty ones."""
    rows = [*attention_rows(p, tp), *mlp_rows(p, tp, is_moe=is_moe)]
    groups = []
    for module in offload_modules(recompute):
        of_module = [row for row in rows if row.offload == module]
        off, again = (
            kept_bytes(iter(some), recompute, fp8_storage=fp8_storage)
            for some in (of_module, [row for row in of_module if row.copies_on_host > 1])
        )
        if off:
            groups.append(Group(module, off, off + again))
    return groups


@dataclass(frozen=True)
class Movable:
    """What can leave the device of one layer's kept bytes."""

    part: float
    copies: float
    """Bytes that arrive on the host for one that leaves the device."""


def movable(r: RunRequest, *, is_moe: bool = True) -> Movable:
    """Under the offload of all ``layer_groups``."""
    if r.modules == "local":
        return Movable(0.0, 1.0)
    return _movable(r.preset, r.tp, r.recompute, is_moe, r.fp8_storage)


@functools.cache
def _movable(
    p: ModelPreset, tp: int, recompute: frozenset[Recompute], is_moe: bool, fp8_storage: bool
) -> Movable:
    groups = layer_groups(p, tp, recompute, is_moe=is_moe, fp8_storage=fp8_storage)
    kept = layer_bytes(p, tp, is_moe=is_moe, recompute=recompute, fp8_storage=fp8_storage)
    off = sum(group.off_device for group in groups)
    return Movable(off / kept, sum(group.to_host for group in groups) / off)


def is_kept_on_device(num_groups: int, fraction: float) -> list[bool]:
    """Megatron's rule for one chunk's groups in the forward's order."""
    num_kept = int(num_groups * (1 - fraction))
    return [index >= num_groups - num_kept for index in range(num_groups)]


def offload_fraction(r: RunRequest) -> float:
    """The least ``--activation-offload-fraction``, in hundredths, that moves what ``r`` plans.

    Of every chunk of MoE layers alone; a dense layer's groups are few and go along.
    """
    groups = layer_groups(r.preset, r.tp, r.recompute, is_moe=True, fp8_storage=r.fp8_storage)
    most = sum(group.off_device for group in groups)
    wanted = r.activation_offload / movable(r).part * most
    lengths = {len(chunk.layers) for chunk in r.chunks() if chunk.layers}
    for hundredths in range(101):
        fraction = hundredths / 100
        moved = (_moved(groups * length, fraction) / length for length in lengths)
        if min(moved) >= wanted * (1 - 1e-9):
            return fraction
    return 1.0


def _moved(groups: list[Group], fraction: float) -> float:
    kept = is_kept_on_device(len(groups), fraction)
    return sum(g.off_device for g, stays in zip(groups, kept, strict=True) if not stays)
