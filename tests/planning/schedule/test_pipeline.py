"""The schedule against Megatron's own tables, a closed form and a clock that ticks.

Times are small integers, so every comparison is exact.
"""

import itertools

import pytest

from megatron_k2.errors import UserError
from megatron_k2.planning.schedule.pipeline import (
    ScheduleShape,
    forward_units,
    num_warmup,
    peak_live,
    rank_order,
)
from tests.oracles.pipeline import bubble_fraction, makespan, simulate, uniform_makespan

SHAPES = [
    ScheduleShape(1, 1, 3),
    ScheduleShape(2, 1, 4),
    ScheduleShape(4, 1, 8),
    ScheduleShape(4, 1, 2),
    ScheduleShape(2, 2, 4),
    ScheduleShape(2, 2, 4, has_extra_warmup=True),
    ScheduleShape(4, 3, 8),
    ScheduleShape(4, 2, 12, has_extra_warmup=True),
]


def ticking_clock(shape, forward, backward, send):
    """The oracle: advance one tick at a time, start whatever a free rank may start."""
    num_chunks = shape.pp * shape.vpp
    orders = [rank_order(shape, rank) for rank in range(shape.pp)]
    running, ended = [None] * shape.pp, {}
    for now in itertools.count():
        for rank in range(shape.pp):
            if running[rank] and running[rank][1] == now:
                unit = running[rank][0]
                ended[unit.kind, unit.microbatch, unit.virtual * shape.pp + rank] = now
                running[rank] = None
        if not any(orders) and not any(running):
            return now
        for rank in range(shape.pp):
            if running[rank] or not orders[rank]:
                continue
            unit = orders[rank][0]
            chunk = unit.virtual * shape.pp + rank
            if unit.kind == "F":
                needs = [(("F", unit.microbatch, chunk - 1), send)] if chunk else []
            else:
                needs = [(("F", unit.microbatch, chunk), 0)]
                if chunk < num_chunks - 1:
                    needs.append((("B", unit.microbatch, chunk + 1), send))
            if all(key in ended and ended[key] + wait <= now for key, wait in needs):
                times = forward if unit.kind == "F" else backward
                running[rank] = (orders[rank].pop(0), now + times[chunk])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("send", [0, 2])
def test_the_simulation_ends_when_a_ticking_clock_does(shape, send):
    chunks = shape.pp * shape.vpp
    forward = [2 + chunk % 3 for chunk in range(chunks)]
    backward = [4 + chunk % 2 for chunk in range(chunks)]
    spans = simulate(shape, forward, backward, send)
    assert makespan(spans) == ticking_clock(shape, forward, backward, send)
    assert len(spans) == 2 * chunks * shape.num_microbatches
    assert makespan(spans) < makespan(simulate(shape, forward, backward, send + 30)) or (
        shape.pp == 1
    )


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("vpp", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_equal_chunks_leave_the_bubble_of_the_closed_form(pp, vpp, groups):
    shape = ScheduleShape(pp, vpp, groups * pp)
    spans = simulate(shape, [1.0] * (pp * vpp), [2.0] * (pp * vpp))
    assert makespan(spans) == uniform_makespan(shape, 1.0, 2.0)
    ideal = shape.num_microbatches * vpp * 3.0
    assert bubble_fraction(spans, pp) == pytest.approx(1 - ideal / makespan(spans))


def test_without_interleaving_the_bubble_would_be_larger():
    shape, plain = ScheduleShape(4, 2, 8), ScheduleShape(4, 1, 8)
    interleaved = simulate(shape, [1.0] * 8, [2.0] * 8)
    assert makespan(interleaved) < makespan(simulate(plain, [2.0] * 4, [4.0] * 4))


@pytest.mark.parametrize(("pp", "vpp", "m"), [(2, 2, 4), (4, 3, 8), (4, 2, 4), (8, 2, 24)])
@pytest.mark.parametrize("extra", [False, True])
def test_order_and_warmup_are_megatrons(pp, vpp, m, extra):
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    shape = ScheduleShape(pp, vpp, m, extra)
    ours = [(unit.microbatch, unit.virtual) for unit in forward_units(shape)]
    assert ours == get_schedule_table(m, vpp, pp)
    for rank in range(pp):
        group = type("Group", (), {"size": lambda _: pp, "rank": lambda _, rank=rank: rank})()
        p2p = type("P2P", (), {"pp_group": group, "virtual_pipeline_model_parallel_size": vpp})()
        found = get_pp_rank_microbatches(
            m, vpp, pp, overlap_moe_expert_parallel_comm=extra, p2p_communicator=p2p
        )
        assert num_warmup(shape, rank) == found[2]


def test_with_the_extra_microbatch_no_pair_shares_a_microbatch_on_the_last_rank():
    def pairs(extra):
        shape = ScheduleShape(4, 2, 8, extra)
        order = rank_order(shape, 3)[num_warmup(shape, 3) :]
        steady = 2 * (16 - num_warmup(shape, 3))
        return list(zip(order[:steady:2], order[1:steady:2], strict=True))

    def clashes(found):
        return [f for f, b in found if (f.microbatch, f.virtual) == (b.microbatch, b.virtual)]

    assert clashes(pairs(extra=True)) == []
    assert clashes(pairs(extra=False)) != []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_waits_for_its_backward_at_most(shape):
    for rank in range(shape.pp):
        expected = min(num_warmup(shape, rank) + 1, shape.num_microbatches * shape.vpp)
        assert peak_live(shape, rank, [1.0] * shape.vpp) == expected
    assert peak_live(ScheduleShape(4, 1, 64), 0, [1.0]) == 4


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="6 micro-batches do not divide by 4"):
        ScheduleShape(4, 2, 6)
    with pytest.raises(UserError, match="needs virtual stages"):
        ScheduleShape(4, 1, 8, has_extra_warmup=True)
