"""The engine without a model: the same answer every time, faults and pauses as asked for."""

import asyncio

import pytest

from megatron_k2.engine.protocol import EngineError, Request, SamplingParams
from megatron_k2.engine.scripted import Faults, ScriptedEngine, answer_of
from megatron_k2.errors import UserError

PARAMS = SamplingParams(max_tokens=6, seed=1)


async def answer(engine, name="a", prompt=(1, 2), params=PARAMS):
    found, reason = [], None
    async for output in engine.generate(Request(name, prompt, params)):
        found += [t.id for t in output.tokens]
        reason = output.finish_reason
    return found, reason


def test_an_answer_is_that_of_its_hash_and_differs_by_prompt_and_seed():
    async def body():
        return await answer(ScriptedEngine()), await answer(ScriptedEngine(), "b")

    first, second = asyncio.run(body())
    assert first == second == ([t.id for t in answer_of((1, 2), PARAMS, 256)], "length")
    other = SamplingParams(max_tokens=6, seed=2)
    assert answer_of((1, 2), PARAMS, 256) != answer_of((1, 2), other, 256)
    assert answer_of((1, 2), PARAMS, 256) != answer_of((1, 3), PARAMS, 256)


def test_a_stop_token_is_the_last():
    stop = answer_of((1, 2), PARAMS, 256)[2].id
    params = SamplingParams(max_tokens=6, seed=1, stop_token_ids=(stop,))
    found, reason = asyncio.run(answer(ScriptedEngine(), params=params))
    assert (found[-1], reason) == (stop, "stop")


def test_a_script_answers_its_prompt_alone():
    engine = ScriptedEngine(script={(1, 2): [7, 8]})
    assert asyncio.run(answer(engine)) == ([7, 8], "length")


def test_faults_have_their_share():
    async def body():
        engine = ScriptedEngine(faults=Faults(error_rate=0.3))
        ends = await asyncio.gather(
            *(answer(engine, str(i)) for i in range(300)), return_exceptions=True
        )
        return sum(isinstance(end, EngineError) for end in ends)

    assert 60 < asyncio.run(body()) < 120


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="more than the 4"):
        asyncio.run(answer(ScriptedEngine(max_length=4)))


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_a_pause_that_ends_answers_returns_when_none_runs(mode):
    async def body():
        engine = ScriptedEngine(faults=Faults(token_seconds=0.005))
        task = asyncio.create_task(answer(engine))
        await asyncio.sleep(0.01)
        await engine.pause(mode)
        return engine.health(), (await task)[1]

    health, reason = asyncio.run(body())
    assert (health.is_paused, health.num_running) == (True, 0)
    assert reason == {"abort": "abort", "wait": "length"}[mode]


def test_a_pause_holds_an_answer_and_an_abort_ends_it():
    async def body():
        engine = ScriptedEngine(faults=Faults(token_seconds=0.005))
        task = asyncio.create_task(answer(engine))
        await asyncio.sleep(0.01)
        await engine.pause("keep")
        held = engine.health()
        await asyncio.sleep(0.05)
        assert not task.done()
        await engine.abort(["a"])
        await engine.resume()
        return held, await task

    held, (found, reason) = asyncio.run(body())
    assert held.is_paused
    assert reason == "abort"
    assert len(found) < 6
