"""Rewards and their parts by hand, and held-out prompts."""

import asyncio
from dataclasses import replace

import pytest

from megatron_k2.engine.protocol import EngineError
from megatron_k2.records.rollouts import End
from megatron_k2.rewards.budget import Budget
from megatron_k2.rewards.judge import Opinion
from megatron_k2.rewards.rubric import RubricReward
from megatron_k2.rl.answers import Answer
from megatron_k2.rl.held_out import HeldOut
from megatron_k2.rl.record import Segment
from megatron_k2.rl.schedule import Toggle
from megatron_k2.rl.scoring import RubricJudge, scores
from megatron_k2.rl.task_sets import task_set_of
from tests.rl.collecting import END, QUICK, RENDERER, made, tasks

SET = task_set_of("a", tasks(3), Budget(10, 0.25))


def answer(verdict, length=3, end=End.OVER, text="1"):
    ids = (*map(ord, text * (length - 1)), END)[-length:]
    return Answer((Segment((1,)), Segment(ids, (-1.0,) * length, 0)), end, verdict)


def scored(answers, task_set=SET, iteration=0, budget=None, judge=None):
    found = scores(task_set, task_set.tasks[0], answers, iteration, budget, judge)
    return [(each.reward, dict(each.parts)) for each in asyncio.run(found)]


def test_a_reward_is_the_sum_of_its_parts():
    found = scored([answer(1.0), answer(1.0, 10, End.TOKENS), answer(0.0, 10, End.TOKENS)])
    assert found == [
        (1.0, {"verdict": 1.0, "budget": 0.0}),
        (0.75, {"verdict": 1.0, "budget": -0.25}),
        (-0.25, {"verdict": 0.0, "budget": -0.25}),
    ]
    assert all(reward == sum(parts.values()) for reward, parts in found)


def test_what_is_not_known_has_no_reward_and_no_parts():
    assert scored([answer(None, end=End.ENVIRONMENT)]) == [(None, {})]


def test_toggle_takes_off_what_is_over_its_budget_in_its_phases_alone():
    toggled = replace(SET, toggle=Toggle(2, 0.5, 50))
    group = [answer(1.0, 3), answer(1.0, 8), answer(0.0, 2), answer(None)]
    found = scored(group, toggled, 0, 4)
    assert [reward for reward, _ in found] == [1.0, 0.0, 0.0, None]
    assert found[1][1] == {"verdict": 1.0, "budget": 0.0, "toggle": -1.0}
    for iteration, budget in ((2, 4), (0, None)):
        free = scored(group, toggled, iteration, budget)
        assert [reward for reward, _ in free] == [1.0, 1.0, 0.0, None]
    seldom = [answer(1.0, 8), answer(0.0), answer(0.0)]  # right less often than half
    assert [reward for reward, _ in scored(seldom, toggled, 0, 4)] == [1.0, 0.0, 0.0]


class Longer:
    name = "longer"

    async def compare(self, question):
        return Opinion(float(len(question.first) > len(question.second)), 1)


def test_a_rubrics_scalars_stand_in_the_verdicts_place():
    judge = RubricJudge(RubricReward(Longer()), RENDERER)
    group = [answer(None, 3), answer(None, 30), answer(0.0, 9, End.DEADLINE)]
    short, long, failed = scored(group, judge=judge)
    assert 0 < short[0] < long[0] < 1
    assert short[1]["verdict"] == short[0]
    assert failed == (None, {})


def held_out(m, **more):
    stream = m.collector._stream
    sets = list(stream.task_sets.values())
    return HeldOut(sets, m.speaker, {"talk": m.domain}, m.ledger, bounds=QUICK, **more)


def test_held_out_prompts_are_tried_at_temperature_1_and_greedy(tmp_path):
    m = made(tmp_path)
    found = asyncio.run(held_out(m, num_samples=4).evaluate(0))
    asked = [request.params.temperature for request in m.engine.requests]
    assert (asked.count(1.0), asked.count(0.0)) == (12, 3)
    assert len({request.params.seed for request in m.engine.requests}) == 15
    assert set(found) == {
        f"eval/short/{name}{end}"
        for name in ("sampled", "greedy")
        for end in ("", "_tokens", "_unknown")
    }
    assert 0 <= found["eval/short/sampled"] <= 1
    asked_before = {request.prompt for request in m.engine.requests}
    m.engine.requests = []
    m.collect(0)
    assert asked_before.isdisjoint(request.prompt for request in m.engine.requests)


def test_an_evaluation_is_made_once_and_read_again_after_a_restart(tmp_path):
    m = made(tmp_path)
    found = asyncio.run(held_out(m).evaluate(0))
    m.collect(0)
    m.close()
    again = made(tmp_path)
    assert asyncio.run(held_out(again).evaluate(0)) == found
    assert not again.engine.requests
    other = asyncio.run(held_out(again).evaluate(1))
    assert {each.params.seed for each in again.engine.requests} == {
        each.params.seed for each in m.engine.requests[:6]
    }
    assert set(other) == set(found)


def test_an_engine_that_fails_is_no_result(tmp_path):
    class Failing:
        async def generate(self, request):
            raise EngineError("gone")
            yield

    m = made(tmp_path)
    m.engine.generate = Failing().generate
    with pytest.raises(EngineError, match="gone"):
        asyncio.run(held_out(m).evaluate(0))
    assert m.ledger.evaluation(0) is None
