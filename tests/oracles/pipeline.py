"""The interleaved schedule run in time, and its closed form: oracles of the planner's timeline.

One event after another, ranks in turn, without the lanes of ``planning/schedule/timeline.py``.
``p`` ranks, ``v`` chunks a rank, ``m`` micro-batches; times are in the caller's unit.
"""

from dataclasses import dataclass

from megatron_k2.planning.schedule.pipeline import Kind, ScheduleShape, Unit, rank_order


@dataclass(frozen=True)
class Span:
    """One micro-batch on one chunk of ``rank``, from ``start`` to ``end``."""

    unit: Unit
    rank: int
    start: float
    end: float


def simulate(
    shape: ScheduleShape,
    forward_time: list[float],
    backward_time: list[float],
    send_time: float = 0.0,
) -> list[Span]:
    """Run the schedule: a unit starts when its rank is free and its input has arrived.

    Args:
        shape: of the schedule.
        forward_time: of each of the ``p v`` chunks, in the forward's order.
        backward_time: likewise.
        send_time: from one chunk to the next, added to the wait and not to either rank's work.

    Returns:
        Every unit of every rank, by start.
    """
    num_chunks = shape.pp * shape.vpp
    orders = [rank_order(shape, rank) for rank in range(shape.pp)]
    position, free = [0] * shape.pp, [0.0] * shape.pp
    done: dict[tuple[Kind, int, int], float] = {}
    spans: list[Span] = []
    ready = list(range(shape.pp))
    while ready:
        rank = ready.pop()
        while position[rank] < len(orders[rank]):
            unit = orders[rank][position[rank]]
            chunk = unit.virtual * shape.pp + rank
            arrived = _arrival(unit, chunk, num_chunks, done, send_time)
            if arrived is None:
                break
            times = forward_time if unit.kind == "F" else backward_time
            start = max(free[rank], arrived)
            end = start + times[chunk]
            spans.append(Span(unit, rank, start, end))
            done[unit.kind, unit.microbatch, chunk] = end
            free[rank], position[rank] = end, position[rank] + 1
            waiting = ((chunk + 1) if unit.kind == "F" else (chunk - 1)) % shape.pp
            if waiting not in ready and waiting != rank:
                ready.append(waiting)
    if any(position[rank] < len(orders[rank]) for rank in range(shape.pp)):
        raise RuntimeError(f"the schedule of {shape} waits for itself")  # pragma: no cover
    return sorted(spans, key=lambda span: (span.start, span.rank))


def _arrival(
    unit: Unit,
    chunk: int,
    num_chunks: int,
    done: dict[tuple[Kind, int, int], float],
    send_time: float,
) -> float | None:
    """When the unit's input is there; ``None``: not yet known."""
    if unit.kind == "F":
        if chunk == 0:
            return 0.0
        before = done.get(("F", unit.microbatch, chunk - 1))
        return None if before is None else before + send_time
    own = done.get(("F", unit.microbatch, chunk))
    if own is None:
        return None
    if chunk == num_chunks - 1:
        return own
    after = done.get(("B", unit.microbatch, chunk + 1))
    return None if after is None else max(own, after + send_time)


def makespan(spans: list[Span]) -> float:
    """From the first start to the last end."""
    return max(span.end for span in spans)


def bubble_fraction(spans: list[Span], pp: int) -> float:
    """Idle time of all ranks over the time of all ranks."""
    busy = sum(span.end - span.start for span in spans)
    return 1 - busy / (pp * makespan(spans))


def uniform_makespan(shape: ScheduleShape, forward: float, backward: float) -> float:
    """Closed form, equal chunks and no sends, ``m`` a multiple of ``p``: (m v + p − 1) (F + B).

    The extra warm-up micro-batch changes which pairs overlap and not this.
    """
    return (shape.num_microbatches * shape.vpp + shape.pp - 1) * (forward + backward)
