"""The engine behind its protocol: many at once, leaving early, pauses, updates, faults."""

import asyncio
import json
from dataclasses import replace

import pytest

from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.opened import core_of
from megatron_k2.engine.protocol import EngineError, Request, SamplingParams
from megatron_k2.errors import UserError
from tests.engine.local.models import TINY, reference, tokens, weights_of

LONG = SamplingParams(temperature=0, max_tokens=60)


@pytest.fixture(scope="module")
def model():
    return reference(TINY)


def scenario(model, body, num_slots=4):
    async def whole():
        engine = LocalEngine(Core(weights_of(model, TINY), num_slots=num_slots, max_length=96))
        try:
            return await asyncio.wait_for(body(engine), 60)
        finally:
            await engine.close()

    return asyncio.run(whole())


async def answer(engine, name, prompt, params=LONG):
    found, reason = [], None
    async for output in engine.generate(Request(name, tuple(prompt), params)):
        found += output.tokens
        reason = output.finish_reason
    return [t.id for t in found], reason


def test_many_at_once_are_each_their_own(model):
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts = [tokens(5 + i % 20, i) for i in range(40)]

    async def body(engine):
        together = await asyncio.gather(
            *(answer(engine, str(i), p, params) for i, p in enumerate(prompts))
        )
        alone = [await answer(engine, "x", p, params) for p in prompts]
        return together, alone

    together, alone = scenario(model, body)
    assert together == alone


def test_leaving_early_frees_the_slot(model):
    async def body(engine):
        outputs = engine.generate(Request("a", tuple(tokens(5)), LONG))
        async for _ in outputs:
            break
        await outputs.aclose()
        await answer(engine, "b", tokens(5), SamplingParams(max_tokens=1))
        return engine.health()

    assert scenario(model, body, num_slots=1).num_running == 0


def test_leaving_before_the_engine_has_looked_takes_nobody_with_it(model):
    async def body(engine):
        crowd = [asyncio.create_task(answer(engine, str(i), tokens(5))) for i in range(50)]
        await asyncio.sleep(0)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        return await answer(engine, "after", tokens(5), SamplingParams(max_tokens=3))

    ids, reason = scenario(model, body)
    assert (len(ids), reason) == (3, "length")


def test_abort_ends_an_answer_by_name(model):
    async def body(engine):
        task = asyncio.create_task(answer(engine, "a", tokens(5)))
        await asyncio.sleep(0)
        await engine.abort(["other"])
        await engine.abort(["a"])
        return await task

    ids, reason = scenario(model, body)
    assert reason == "abort"
    assert len(ids) < 60


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_pause(model, mode):
    async def body(engine):
        whole, _ = await answer(engine, "first", tokens(5))
        task = asyncio.create_task(answer(engine, "a", tokens(5)))
        while not engine.health().num_running:
            await asyncio.sleep(0.001)
        await engine.pause(mode)
        late = asyncio.create_task(answer(engine, "late", tokens(5)))
        await asyncio.sleep(0.05)
        assert not late.done()
        assert task.done() == (mode != "keep")
        assert engine.health().is_paused
        await engine.resume()
        return whole, await task, await late

    whole, (ids, reason), late = scenario(model, body)
    assert late == (whole, "length")
    if mode == "abort":
        assert (reason, whole[: len(ids)]) == ("abort", ids)
    else:
        assert (ids, reason) == (whole, "length")


def test_a_failed_update_refuses_until_one_succeeds(model):
    whole = classic_from_transformers(model.state_dict())
    cut = dict(list(whole.items())[:-1])

    async def body(engine):
        before, _ = await answer(engine, "a", tokens(5))
        task = asyncio.create_task(answer(engine, "b", tokens(5)))
        while not engine.health().num_running:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineError, match="never came"):
            await engine.update_weights(cut.items(), "1")
        with pytest.raises(EngineError, match="never came"):
            await task
        assert engine.health()[::4] == (False, 0)  # not ready, nothing in a slot
        with pytest.raises(EngineError, match="'1' failed"):
            await answer(engine, "c", tokens(5))
        await engine.update_weights(whole.items(), "2")
        assert engine.health()[:4:3] == (True, "2")
        return before, (await answer(engine, "d", tokens(5)))[0]

    before, after = scenario(model, body)
    assert before == after


def test_a_step_that_fails_is_an_error_not_a_hang(model):
    async def body(engine):
        engine._core._model.forward = lambda *_a, **_k: 1 / 0
        with pytest.raises(EngineError, match="division by zero"):
            await answer(engine, "a", tokens(5))
        return engine.health()

    assert not scenario(model, body).is_ready


def test_what_does_not_fit_is_refused_before_it_waits(model):
    async def body(engine):
        with pytest.raises(UserError, match="are more than the 96"):
            await answer(engine, "a", tokens(50))
        with pytest.raises(UserError, match="pause mode"):
            await engine.pause("soon")

    scenario(model, body)


def test_an_export_is_served(model, tmp_path):
    from safetensors.torch import save_file

    named = classic_from_transformers(model.state_dict())
    save_file({k: v.contiguous() for k, v in named.items()}, tmp_path / "model.safetensors")
    config = json.dumps(hf_config(TINY, model_type="deepseek_v3"))
    (tmp_path / "config.json").write_text(config)

    async def body(first):
        second = LocalEngine(core_of(tmp_path, num_slots=2, max_length=96))
        assert second.limits == (96, 96, 2)
        found = await answer(second, "a", tokens(9))
        await second.close()
        return found, await answer(first, "a", tokens(9))

    served, direct = scenario(model, body)
    assert served == direct
    with pytest.raises(UserError, match="this model reads up to"):
        core_of(tmp_path, num_slots=2, max_length=1 << 20)


def test_an_exports_groups_of_experts_are_read(tmp_path):
    from safetensors.torch import save_file

    preset = replace(TINY, moe_router_topk=4)
    named = classic_from_transformers(reference(preset, groups=(4, 2)).state_dict())
    save_file({k: v.contiguous() for k, v in named.items()}, tmp_path / "model.safetensors")
    config = hf_config(preset, model_type="deepseek_v3") | {"n_group": 4, "topk_group": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = LocalEngine(core_of(tmp_path, num_slots=1, max_length=96))
    assert engine._core.weights.expert_groups == (4, 2)
    asyncio.run(engine.close())
