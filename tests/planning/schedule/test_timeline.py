"""The lanes against the plain schedule where they must agree, and against a clock that ticks."""

import itertools

import pytest

from megatron_k2.planning.schedule.pipeline import ScheduleShape
from megatron_k2.planning.schedule.timeline import (
    ChunkCost,
    build,
    exposed,
    run,
    simulate_tasks,
    span,
)
from tests.oracles.pipeline import makespan, simulate

SHAPES = [
    ScheduleShape(1, 1, 3),
    ScheduleShape(3, 1, 6),
    ScheduleShape(2, 2, 4),
    ScheduleShape(2, 2, 6, has_extra_warmup=True),
    ScheduleShape(4, 2, 8, has_extra_warmup=True),
]


def costs(shape, dispatch=0, send=0, offload=0):
    return [
        ChunkCost(2 + c % 2, 3, 4, 3 + c % 3, 2, dispatch, send, offload)
        for c in range(shape.pp * shape.vpp)
    ]


def ticking_clock(lanes):
    """The oracle: tick by tick, a lane starts its next task once all that it needs has ended."""
    queues = [list(lane) for lane in lanes]
    ended, running = {}, [None] * len(queues)
    for now in itertools.count():
        progress = True
        while progress:
            progress = False
            for i, queue in enumerate(queues):
                if running[i] and running[i][1] <= now:
                    ended[id(running[i][0])] = now
                    running[i] = None
                    progress = True
                if running[i] is None and queue and all(id(n) in ended for n in queue[0].needs):
                    task = queue.pop(0)
                    running[i] = (task, now + task.seconds)
                    progress = True
        if not any(queues) and not any(running):
            return now


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("other", [(0, 0, 0), (2, 1, 0), (5, 3, 9)])
def test_the_last_task_ends_when_a_ticking_clock_stops(shape, other):
    lanes = build(shape, costs(shape, *other))
    assert ticking_clock(lanes) == span(run(lanes))


@pytest.mark.parametrize("shape", [s for s in SHAPES if not s.has_extra_warmup], ids=str)
def test_without_communication_it_is_the_plain_schedule(shape):
    found = simulate_tasks(shape, costs(shape))
    forward = [c.attention_forward + c.mlp_forward for c in costs(shape)]
    # the weight gradients come after the input gradients are on their way
    ends = {t.unit: t.end for t in found if t.rank == shape.pp - 1 and t.name == "weight gradients"}
    backward = [c.attention_backward + c.mlp_backward + c.weight_gradients for c in costs(shape)]
    plain = simulate(shape, forward, backward)
    assert span(found) <= makespan(plain)
    last = next(s for s in plain if s.unit.kind == "B" and s.rank == shape.pp - 1)
    assert ends[last.unit] == last.end


def test_the_extra_microbatch_hides_the_all_to_all():
    plain, extra = ScheduleShape(4, 2, 16), ScheduleShape(4, 2, 16, has_extra_warmup=True)
    exposed_plain, exposed_extra = (
        exposed(simulate_tasks(s, costs(s, dispatch=2)), "all-to-all") for s in (plain, extra)
    )
    assert exposed_extra < 0.4 * exposed_plain
    free = span(simulate_tasks(extra, costs(extra)))
    assert span(simulate_tasks(extra, costs(extra, dispatch=2))) < 1.15 * free
    assert span(simulate_tasks(plain, costs(plain, dispatch=2))) > 1.25 * free


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exposed_time_equals_a_count_of_ticks(shape):
    tasks = simulate_tasks(shape, costs(shape, 3, 1, 0))

    def works(rank, lane, tick):
        return any(t.rank == rank and t.lane == lane and t.start <= tick < t.end for t in tasks)

    ticks = itertools.product(range(shape.pp), range(int(span(tasks))))
    expected = sum(
        works(rank, "all-to-all", tick) and not works(rank, "arithmetic", tick)
        for rank, tick in ticks
    )
    assert exposed(tasks, "all-to-all") == expected


def test_nothing_starts_before_what_it_needs():
    shape = ScheduleShape(4, 2, 8, has_extra_warmup=True)
    for task in simulate_tasks(shape, costs(shape, 2, 1, 3)):
        assert all(need.end <= task.start for need in task.needs)
        assert task.end == task.start + task.seconds


def test_activations_return_at_most_one_backward_ahead():
    shape = ScheduleShape(2, 2, 8, has_extra_warmup=True)
    tasks = simulate_tasks(shape, costs(shape, 1, 1, 2))
    for rank in range(2):
        onloads = [t for t in tasks if t.rank == rank and t.name == "onload"]
        done = [t for t in tasks if t.rank == rank and t.unit.kind == "B" and t.name == "attention"]
        for i, onload in enumerate(onloads):
            assert sum(t.end <= onload.start for t in done) >= i - 1
