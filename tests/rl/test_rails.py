"""Alarms are functions of the metrics before them: what sets them off, and what does not."""

import itertools
import math
import random

import pytest

from megatron_k2.errors import UserError
from megatron_k2.rl.rails import RAILS, alarms, rails_from


def of_run(name, values, rails=RAILS):
    rows = [{name: value} for value in values]
    return [alarms(n, row, rows[:n], rails) for n, row in enumerate(rows)]


def test_a_run_that_learns_sets_nothing_off():
    order = random.Random(1)
    rewards = [min(1.0, 0.5 + 0.01 * n + order.uniform(-0.1, 0.1)) for n in range(60)]
    assert not any(of_run("rl/verdict/sums", rewards))
    assert not any(of_run("rl/tokens/sums", [100 + n for n in range(60)]))


def test_a_reward_that_falls_stops():
    rewards = [0.6, 0.62, 0.6, 0.64, 0.63, 0.62, 0.5, 0.3, 0.3, 0.2, 0.2, 0.2]
    found = of_run("rl/verdict/sums", rewards)
    assert not any(found[:8])
    (alarm,) = found[-1]
    assert alarm.rail.action == "stop"
    assert "iteration 12: rl/verdict/sums is 0.2, under 0.27" in str(alarm)
    # The wrong variant, against the iteration before alone, sees no step of it.
    steps = [b - a for a, b in itertools.pairwise(rewards)]
    assert min(steps) > -0.25


def test_one_bad_iteration_is_no_fall():
    assert not any(of_run("rl/verdict/sums", [0.6] * 8 + [0.1] + [0.6] * 8))


@pytest.mark.parametrize(
    ("name", "value", "rail"),
    [
        ("learn/kl", 0.6, "kl"),
        ("learn/mismatch", 0.2, "mismatch"),
        ("rl/surprise", 0.001, "entropy"),
        ("rl/truncated/sums", 0.7, "truncated"),
        ("rl/dead_groups", 1.0, "dead"),
        ("rl/repeating", 0.5, "repeating"),
        ("learn/kl", math.nan, "kl"),
    ],
)
def test_absolute_bounds(name, value, rail):
    assert [alarm.rail.name for alarm in alarms(3, {name: value}, [])] == [rail]


def test_an_engine_that_computes_something_else_stops():
    assert {a.rail.action for a in alarms(0, {"learn/mismatch": 2.0}, [])} == {"warn", "stop"}


def test_growth_is_against_the_beginning():
    found = of_run("learn/update_rms", [1e-3] * 6 + [2e-2] * 6)
    assert not any(found[:6])
    assert found[-1]
    assert not any(of_run("learn/clipped_heads", [0.0] * 20))


def test_a_resumed_run_decides_as_one_that_never_stopped():
    rewards = [0.6] * 6 + [0.2] * 6
    whole = of_run("rl/verdict/a", rewards)
    rows = [{"rl/verdict/a": value} for value in rewards]
    assert alarms(11, rows[11], rows[:11]) == whole[11]


def test_rails_by_flag():
    given = rails_from(["reward=0.5:warn", "kl=off", "dead=0.5"])
    found = {rail.name: rail for rail in given}
    assert (found["reward"].bound, found["reward"].action) == (0.5, "warn")
    assert "kl" not in found
    assert found["dead"].action == "warn"
    assert len(given) == len(RAILS) - 1


@pytest.mark.parametrize("text", ["reward", "rewards=1", "kl=much", "kl=1:shout", "kl=nan"])
def test_rails_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="--rail"):
        rails_from([text])
