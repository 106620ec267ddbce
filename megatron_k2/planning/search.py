"""Every layout of a cluster, ranked: TP x PP x VPP x EP x CP x micro-batch x recompute.

Thousands of layouts are costed by closed forms (equal chunks, the fullest of the first two ranks);
only the best are then estimated in full by ``estimate.py``, by which the result is ordered.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from megatron_k2.errors import UserError
from megatron_k2.planning.cost.activations import head_bytes, layer_bytes
from megatron_k2.planning.cost.memory import (
    GRADIENT_BYTES,
    WEIGHT_BYTES,
    Parameters,
    frozen_bytes,
    optimizer_bytes,
    optimizer_step_bytes,
    trained_parameters,
)
from megatron_k2.planning.estimate import (
    Assumptions,
    Estimate,
    arithmetic_seconds,
    chunk_costs,
    estimate,
    layer_cost,
)
from megatron_k2.planning.gpus import GPUS, GPUS_PER_NODE
from megatron_k2.planning.memory_fit import fit_to_memory, most_activations
from megatron_k2.planning.request import Modules, Recompute, RunRequest
from megatron_k2.planning.schedule.chunks import split_into_chunks
from megatron_k2.planning.schedule.pipeline import ScheduleShape, num_warmup
from megatron_k2.presets import ModelPreset

MICRO_BATCHES = (1, 2, 4)
OPTIMIZER_OFFLOADS = (0.0, 0.5, 1.0)
"""Parts of the optimizer's states on the host, tried in turn, behind all the activations there."""


@dataclass(frozen=True)
class Found:
    """The layouts that take the least time a step, and how many were looked at."""

    best: list[Estimate]
    num_layouts: int
    """Layouts that Megatron could run."""
    num_fitting: int


def _powers_of_two(most: int) -> Iterator[int]:
    return itertools.takewhile(lambda n: n <= most, (1 << i for i in itertools.count()))


def _recomputes() -> list[frozenset[Recompute]]:
    names: tuple[Recompute, ...] = get_args(Recompute)
    sizes = range(len(names) + 1)
    return [frozenset(c) for size in sizes for c in itertools.combinations(names, size)]


RECOMPUTES = _recomputes()


def cheapest_first(base: RunRequest, a: Assumptions) -> list[frozenset[Recompute]]:
    """The choices by what they compute again in an MoE layer; layouts do not change that order."""
    one_gpu = base.replace(world_size=1, tp=1, pp=1, vpp=1, ep=1, cp=1)
    allowed = (c for c in RECOMPUTES if base.modules == "transformer_engine" or "mla_up" not in c)
    return sorted(
        allowed, key=lambda c: arithmetic_seconds(layer_cost(one_gpu.replace(recompute=c), a))
    )


def layouts(base: RunRequest) -> Iterator[RunRequest]:
    """Every layout of ``base``'s GPUs and batch that Megatron could run, recompute aside."""
    p = base.preset
    for tp in _powers_of_two(GPUS_PER_NODE):
        if p.num_attention_heads % tp or p.vocab_size % tp:
            continue
        for pp, cp in itertools.product(_powers_of_two(p.num_layers), _powers_of_two(64)):
            if base.world_size % (tp * pp * cp) or base.seq_length % (2 * cp * tp):
                continue
            for ep in _powers_of_two(p.num_moe_experts):
                if p.num_moe_experts % ep or base.world_size % (pp * ep):
                    continue
                yield from _schedules(base.replace(tp=tp, pp=pp, cp=cp, ep=ep))


def _schedules(r: RunRequest) -> Iterator[RunRequest]:
    for micro in MICRO_BATCHES:
        if r.sequences_per_step % (micro * r.data_parallel):
            continue
        at = r.replace(micro_batch_size=micro)
        for vpp in range(1, r.preset.num_layers // r.pp + 1 if r.pp > 1 else 2):
            if vpp == 1 or (at.num_microbatches % r.pp == 0 and vpp <= 8):
                if _can_split(r.preset.num_layers, r.pp, vpp):
                    yield at.replace(vpp=vpp)


@functools.cache
def _can_split(num_layers: int, pp: int, vpp: int) -> bool:
    try:
        split_into_chunks(num_layers, pp, vpp)
    except UserError:
        return False
    return True


@functools.cache
def _parameters(
    p: ModelPreset, tp: int, pp: int, vpp: int, ep: int, lora: tuple[int, bool]
) -> list[tuple[Parameters, float]]:
    """(what trains, bytes of the rest) of the ranks that could be fullest: first two, the last."""
    r = RunRequest(
        preset=p,
        gpu=next(iter(GPUS.values())),
        world_size=tp * pp * ep,
        seq_length=1,
        sequences_per_step=1,
        tp=tp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        lora_rank=lora[0],
        lora_base_fp8=lora[1],
    )
    ranks = sorted({0, min(1, pp - 1), pp - 1})
    return [(trained_parameters(r, rank), frozen_bytes(r, rank)) for rank in ranks]


@dataclass(frozen=True)
class QuickMemory:
    """Upper estimate of the fullest rank's bytes."""

    fixed: float
    """Bytes of weights and gradients, which no choice changes."""
    optimizer: float
    step: dict[bool, float]
    """Bytes worked on during the optimizer's step, without and with states on the host."""
    tokens_alive: float
    """Tokens times layers whose activations wait for their backward."""
    head_tokens: float


def quick_memory(r: RunRequest) -> QuickMemory:
    """The estimate for ``r``, without what offload and recompute save."""
    longest = _longest_chunk(r.preset.num_layers, r.pp, r.vpp)
    shape = ScheduleShape(r.pp, r.vpp, r.num_microbatches, r.has_overlap and r.vpp > 1)
    live = min(num_warmup(shape, min(1, r.pp - 1)) + 1, r.num_microbatches * r.vpp)
    both = _parameters(r.preset, r.tp, r.pp, r.vpp, r.ep, (r.lora_rank, r.lora_base_fp8))
    ranks = [trained for trained, _ in both]
    return QuickMemory(
        fixed=max(
            (WEIGHT_BYTES + GRADIENT_BYTES) * trained.total + frozen for trained, frozen in both
        ),
        optimizer=max(optimizer_bytes(r, p) for p in ranks),
        step={is_on_host: _step_bytes(r, is_on_host, ranks) for is_on_host in (False, True)},
        tokens_alive=float(live * longest * r.tokens_per_microbatch),
        head_tokens=float(r.tokens_per_microbatch),
    )


def _step_bytes(r: RunRequest, is_on_host: bool, ranks: list[Parameters]) -> float:
    at = r.replace(optimizer_offload=float(is_on_host))
    first, *rest = ranks
    return max(
        optimizer_step_bytes(at, first, has_dense_layer=True),
        *(optimizer_step_bytes(at, p, has_dense_layer=False) for p in rest),
        0.0,
    )


def _kept(r: RunRequest, memory: QuickMemory, recompute: frozenset[Recompute]) -> float:
    p, fp8 = r.preset, r.fp8_storage
    layers = memory.tokens_alive * layer_bytes(
        p, r.tp, is_moe=True, recompute=recompute, fp8_storage=fp8, modules=r.modules
    )
    head = memory.head_tokens * _head_bytes(p, r.tp, r.modules)
    return max(layers, head) if r.pp > 1 else layers + head


@functools.cache
def _head_bytes(p: ModelPreset, tp: int, modules: Modules) -> float:
    return head_bytes(p, tp, modules)


@functools.cache
def _longest_chunk(num_layers: int, pp: int, vpp: int) -> int:
    """Number of layers of the longest model chunk."""
    return max(len(chunk.layers) for chunk in split_into_chunks(num_layers, pp, vpp))


def quick_seconds(r: RunRequest, a: Assumptions) -> float:
    """Seconds of one step: the busiest rank's arithmetic, what cannot be hidden, fill and drain.

    Copies to the host run beside the arithmetic until they take longer; optimizer states' do not.
    """
    costs = chunk_costs(r, a)
    busy = [arithmetic_seconds(cost) for cost in costs]
    is_hidden = r.has_overlap and r.vpp > 1
    exposed = [
        max(0.0, 4 * cost.dispatch - seconds * is_hidden)
        for cost, seconds in zip(costs, busy, strict=True)
    ]
    both = [seconds + wait for seconds, wait in zip(busy, exposed, strict=True)]
    by_rank = max(sum(both[rank :: r.pp]) for rank in range(r.pp))
    copies = max(sum(cost.offload for cost in costs[rank :: r.pp]) for rank in range(r.pp))
    seconds = r.num_microbatches * max(by_rank, copies) + (r.pp - 1) * max(both)
    return seconds + _states_copy_seconds(r, a)


def _states_copy_seconds(r: RunRequest, a: Assumptions) -> float:
    if not r.optimizer_offload:
        return 0.0
    moved = r.optimizer_offload * quick_memory(r).optimizer
    return moved / (r.gpu.pcie_gb_per_s * 1e9 * a.part("host"))


@dataclass(frozen=True)
class _Fitting:
    """The choices of one layout that fit into memory."""

    choices: list[RunRequest]
    """For each amount of offload that allows a cheaper recompute than less does, that one."""
    count: int
    """Recomputes that fit with some offload."""
    least: float
    """Bytes with everything recomputed and offloaded that can be."""


def _fitting(r: RunRequest, a: Assumptions, recomputes: list[frozenset[Recompute]]) -> _Fitting:
    room = (r.gpu.memory_gb - a.reserved_gb) * 1e9
    memory = quick_memory(r)
    kept = [_kept(r, memory, recompute) for recompute in recomputes]
    most = [round(most_activations(r.replace(recompute=recompute)), 2) for recompute in recomputes]
    left = [size * (1 - part) for size, part in zip(kept, most, strict=True)]
    choices, cheapest, count = [], len(recomputes), 0
    for has_offload, optimizer in [(False, 0.0), *((True, part) for part in OPTIMIZER_OFFLOADS)]:
        states = memory.fixed + memory.optimizer * (1 - optimizer)
        step = memory.step[optimizer > 0]
        sizes = left if has_offload else kept
        fits = [i for i, size in enumerate(sizes) if states + max(size, step) <= room]
        count = max(count, len(fits))
        if fits and fits[0] < cheapest:
            cheapest = fits[0]
            choices.append(
                r.replace(
                    recompute=recomputes[cheapest],
                    activation_offload=most[cheapest] if has_offload else 0.0,
                    optimizer_offload=optimizer,
                )
            )
    least = memory.fixed + max(min(left), memory.step[True])
    return _Fitting(choices, count, least)


def search(base: RunRequest, a: Assumptions | None = None, top: int = 10) -> Found:
    """Rank every layout by tokens per second.

    Args:
        base: GPUs, batch and sequence; its layout and recompute are ignored.
        a: rates.
        top: how many to show.

    Raises:
        UserError: where nothing fits.
    """
    a = a or Assumptions()
    recomputes = cheapest_first(base, a)
    num_layouts = num_fitting = 0
    costed: list[tuple[float, int, RunRequest]] = []
    nearest: tuple[float, RunRequest] | None = None
    for layout in layouts(base):
        num_layouts += len(recomputes)
        found = _fitting(layout, a, recomputes)
        num_fitting += found.count
        if found.choices:
            seconds, index = min((quick_seconds(r, a), i) for i, r in enumerate(found.choices))
            costed.append((seconds, len(costed), found.choices[index]))
        elif nearest is None or found.least < nearest[0]:
            nearest = (found.least, layout)
    if not costed:
        raise UserError(_nothing_fits(base, nearest, a))
    exact = (estimate(_least_offload(r, a), a) for _, _, r in sorted(costed))
    best = list(itertools.islice((e for e in exact if e.fits), 2 * top))
    best.sort(key=lambda e: -e.tokens_per_second)
    return Found(best[:top], num_layouts, num_fitting)


def _least_offload(r: RunRequest, a: Assumptions) -> RunRequest:
    """``r`` with no more on the host than the exact bytes need; as it is where they need more."""
    try:
        return fit_to_memory(r, a.reserved_gb)
    except UserError:
        return r


def _nothing_fits(
    base: RunRequest, nearest: tuple[float, RunRequest] | None, a: Assumptions
) -> str:
    if nearest is None:
        return (
            f"no layout of {base.world_size} GPUs divides {base.sequences_per_step} sequences of "
            f"{base.seq_length}; change --world-size or --sequences-per-step"
        )
    needed, r = nearest
    return (
        f"no layout of {base.world_size} x {base.gpu.name} fits in {base.gpu.memory_gb:g} GB; the "
        f"nearest, TP {r.tp} PP {r.pp} VPP {r.vpp} EP {r.ep} CP {r.cp}, needs "
        f"{needed / 1e9 + a.reserved_gb:.0f} GB; take more GPUs, or larger ones"
    )
