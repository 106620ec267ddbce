"""The pipeline's schedule as data: what each rank does in which order (``timeline.py``: when).

Order is Megatron's interleaved 1F1B (``core/pipeline_parallel/schedules.py``), with the report's
one extra warm-up micro-batch (section 2.4.3) as ``--overlap-moe-expert-parallel-comm`` adds it:
then the forward and the backward of every steady-state pair belong to different micro-batches, and
one's all-to-all can hide under the other's arithmetic.

Legend: ``p`` pipeline ranks, ``v`` chunks a rank (virtual stages), ``m`` micro-batches; a unit is
one micro-batch on one chunk, forward (F) or backward (B).
"""

from dataclasses import dataclass
from typing import Literal

from megatron_k2.errors import UserError

Kind = Literal["F", "B"]


@dataclass(frozen=True)
class Unit:
    """One micro-batch through one chunk."""

    kind: Kind
    microbatch: int
    virtual: int
    """Chunk on its rank, in the forward's order."""


@dataclass(frozen=True)
class ScheduleShape:
    """The sizes that determine the order of every rank."""

    pp: int
    vpp: int
    num_microbatches: int
    has_extra_warmup: bool = False

    def __post_init__(self) -> None:
        if self.vpp > 1 and self.num_microbatches % self.pp:
            raise UserError(
                f"{self.num_microbatches} micro-batches do not divide by {self.pp} pipeline ranks, "
                "which interleaving over virtual stages needs; change the batch, or --vpp 1"
            )
        if self.has_extra_warmup and self.vpp == 1 and self.pp > 1:
            raise UserError(
                "the extra warm-up micro-batch needs virtual stages (--vpp above 1), as Megatron's "
                "--overlap-moe-expert-parallel-comm does"
            )


def forward_units(shape: ScheduleShape) -> list[Unit]:
    """Forwards in the order of every rank: groups of ``p`` micro-batches, chunk after chunk."""
    group = shape.pp if shape.vpp > 1 else shape.num_microbatches
    return [
        Unit("F", microbatch, virtual)
        for first in range(0, shape.num_microbatches, group)
        for virtual in range(shape.vpp)
        for microbatch in range(first, min(first + group, shape.num_microbatches))
    ]


def num_warmup(shape: ScheduleShape, rank: int) -> int:
    """Forwards of ``rank`` before its first backward, one less than it then holds."""
    total = shape.num_microbatches * shape.vpp
    ahead = shape.pp - rank - 1
    if shape.vpp > 1:
        ahead = 2 * ahead + (shape.vpp - 1) * shape.pp
    return min(total, ahead + shape.has_extra_warmup)


def rank_order(shape: ScheduleShape, rank: int) -> list[Unit]:
    """Every unit of ``rank``: warm-up forwards, then one forward and one backward in turn."""
    forwards = forward_units(shape)
    backwards = [Unit("B", u.microbatch, shape.vpp - 1 - u.virtual) for u in forwards]
    warmup = num_warmup(shape, rank)
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - warmup :]


def peak_live(shape: ScheduleShape, rank: int, weights: list[float]) -> float:
    """Largest sum of ``weights`` over the units of ``rank`` that await their backward.

    Args:
        shape: of the schedule.
        rank: whose.
        weights: of each of its ``v`` chunks: bytes that a micro-batch leaves for the backward.
    """
    live = peak = 0.0
    # The steady state repeats: 2 p v units see the peak of every rank.
    few = min(shape.num_microbatches, 4 * shape.pp)
    short = ScheduleShape(shape.pp, shape.vpp, few, shape.has_extra_warmup)
    for unit in rank_order(short, rank):
        live += weights[unit.virtual] if unit.kind == "F" else -weights[unit.virtual]
        peak = max(peak, live)
    return peak
