"""Where an iteration ends, against an engine that is played out step by step.

Wrong variant: a clock that counts every answer from step 0, though it had to wait for a slot. One
that goes by the clock on the wall is in ``test_rollouts.py``.
"""

import math
import random

import pytest

from megatron_k2.errors import UserError
from megatron_k2.rl.cut import Clock, Cut, starts


def lock_step(groups, lengths, cut):
    """The oracle: slots, a token a step, answers in their order; (step, [(kept, finished)])."""
    waiting, slots, drawn = list(range(len(lengths))), [], [0] * len(lengths)
    finished, step = set(), 0
    while True:
        done = {place for place in slots if drawn[place] == lengths[place]}
        finished |= done
        slots = [place for place in slots if place not in done]
        while waiting and len(slots) < cut.num_slots:
            slots.append(waiting.pop(0))
        whole = {g for g in groups if all(p in finished for p, x in enumerate(groups) if x == g)}
        if len(whole) >= cut.num_groups or step == cut.num_steps:
            return step, [(drawn[place], place in finished) for place in range(len(lengths))]
        for place in slots:  # one that fails before its first token holds its slot for a step
            drawn[place] += drawn[place] < lengths[place]
        step += 1


def played(groups, lengths, cut, concurrency, rng):
    """A real engine of any speeds: each turn some answer that may go on draws a few tokens."""
    clock, waiting, going = Clock(groups, cut), list(range(len(groups))), []
    while waiting or going:
        while waiting and len(going) < concurrency:
            place = waiting.pop(0)
            if not clock.begin(place):
                continue
            if lengths[place]:
                going.append(place)
            else:
                clock.finish(place)
        if not going:
            continue
        place = rng.choice(going)
        count = min(rng.choice((1, 1, 2, 7)), lengths[place] - clock.steps(place))
        clock.draw(place, int(min(count, max(0, clock.num_left(place)))))
        if clock.steps(place) == lengths[place]:
            clock.finish(place)
            going.remove(place)
        elif clock.num_left(place) <= 0:
            going.remove(place)
    return clock.settled()


def drawn_case(rng):
    num_groups, size = rng.randint(1, 6), rng.randint(1, 4)
    groups = [group for group in range(num_groups) for _ in range(size)]
    lengths = [rng.choice((0, 1, 2, 5, 5, 9, 30)) for _ in groups]
    steps = rng.choice((None, 1, 4, 12, 100))
    return groups, lengths, Cut(rng.randint(1, num_groups), rng.randint(1, 9), steps)


@pytest.mark.parametrize("computations", [256, 1])
@pytest.mark.parametrize("concurrency", [1, 3, 8, 100])
def test_any_engine_settles_where_one_in_lock_step_does(concurrency, computations, monkeypatch):
    """However seldom bounds are computed: once for all runs, they cut nothing off but the end."""
    monkeypatch.setattr("megatron_k2.rl.cut._COMPUTATIONS", computations)
    rng = random.Random(concurrency)
    for _ in range(300):
        groups, lengths, cut = drawn_case(rng)
        assert played(groups, lengths, cut, concurrency, rng) == lock_step(groups, lengths, cut)


def test_counting_from_step_0_is_found():
    rng, num_wrong = random.Random(2), 0
    for _ in range(100):
        groups, lengths, cut = drawn_case(rng)
        ends = sorted(
            max(n for g, n in zip(groups, lengths, strict=True) if g == x) for x in set(groups)
        )
        naive = min(ends[cut.num_groups - 1], cut.num_steps or math.inf)
        num_wrong += naive != lock_step(groups, lengths, cut)[0]
    assert num_wrong > 20


def test_runs_take_slots_in_their_order():
    assert starts([5, 2, 4, 1], 2) == [0, 0, 2, 5]
    assert starts([math.inf, 3, 1, 1], 2) == [0, 0, 3, 4]


@pytest.mark.parametrize("changed", [{"num_groups": 0}, {"num_slots": 0}, {"num_steps": 0}])
def test_numbers_below_1_are_refused(changed):
    with pytest.raises(UserError, match="expected 1 or more"):
        Cut(**{"num_groups": 1, "num_slots": 1, **changed})
