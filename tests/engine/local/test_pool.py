"""Two processes behind one engine: answers are the one-process engine's, and none waits for ever.

The processes start once for the file; the test in which one dies stands last.
"""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.pool import PoolEngine
from megatron_k2.engine.protocol import NO_WEIGHTS, EngineError, Request, SamplingParams
from megatron_k2.errors import UserError
from tests.engine.local.models import TINY, reference, saved, tokens, weights_of
from tests.engine.local.test_core import run

LONG = SamplingParams(temperature=0, max_tokens=400)
SLOTS = {"num_slots": 6, "max_length": 512, "is_batch_invariant": True}
REQUESTS = [
    Request(str(i), tuple(tokens(5 + 3 * i, i)), SamplingParams(max_tokens=9, seed=i, logprobs=2))
    for i in range(14)
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return reference(TINY)


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pool(model, loop, tmp_path_factory):
    folder = saved(model, TINY, tmp_path_factory.mktemp("export"))
    found = PoolEngine.from_directory(folder, num_processes=2, **SLOTS)
    yield found
    loop.run(found.close())
    assert not found.health().is_ready


async def answer(pool, request):
    found = []
    async for output in pool.generate(request):
        found += output.tokens
    return found


async def answers(pool, requests):
    found = await asyncio.gather(*(answer(pool, r) for r in requests))
    return {r.id: tokens for r, tokens in zip(requests, found, strict=True)}


def in_one_process(model, version="0"):
    core = Core(weights_of(model, TINY), version=version, **SLOTS)
    return run(core, REQUESTS)[0]


def test_answers_are_those_of_one_process_to_the_bit(pool, loop, model):
    assert loop.run(answers(pool, REQUESTS)) == in_one_process(model)
    assert pool.limits.num_slots == 6


def test_both_processes_work_and_their_weights_are_the_same_pages(pool, loop):
    before = loop.run(pool.cpu_seconds())
    loop.run(answers(pool, REQUESTS))
    after = loop.run(pool.cpu_seconds())
    assert all(b > a for a, b in zip(before, after, strict=True))
    inodes = []
    for member in pool._members:
        lines = Path(f"/proc/{member.process.pid}/maps").read_text().splitlines()
        mapped = [line.split() for line in lines if "megatron-k2-weights-" in line]
        assert all(flags.endswith("s") for _, flags, *_ in mapped)
        inodes.append({fields[4] for fields in mapped})
    assert inodes[0] == inodes[1]
    assert len(inodes[0]) > 20


def test_leaving_early_frees_a_slot(pool, loop):
    async def body():
        outputs = [pool.generate(Request(str(i), (1, 2, 3), LONG)) for i in range(6)]
        for each in outputs:
            await anext(each)
            await each.aclose()
        return await answers(pool, REQUESTS)

    assert len(loop.run(body())) == len(REQUESTS)
    assert pool.health().num_running == 0


def test_pause_keeps_and_resume_goes_on(pool, loop):
    async def body():
        await pool.pause("keep")
        task = asyncio.create_task(answers(pool, REQUESTS[:4]))
        await asyncio.sleep(0.2)
        assert not task.done()
        assert pool.health().is_paused
        await pool.resume()
        return await task

    assert len(loop.run(body())) == 4


def test_new_weights_reach_every_process(pool, loop, model):
    other = reference(TINY, seed=1)
    named = classic_from_transformers(other.state_dict())

    async def body():
        await pool.update_weights(named.items(), "1")
        return await answers(pool, REQUESTS)

    assert loop.run(body()) == in_one_process(other, "1")
    assert pool.health().weight_version == "1"


def test_a_failed_update_refuses_until_one_succeeds(pool, loop, model):
    named = classic_from_transformers(model.state_dict())

    async def body():
        with pytest.raises(EngineError, match="never came"):
            await pool.update_weights(list(named.items())[:-1], "2")
        with pytest.raises(EngineError, match="failed"):
            await answer(pool, REQUESTS[0])
        assert not pool.health().is_ready
        await pool.update_weights(named.items(), "0")
        return await answers(pool, REQUESTS)

    assert loop.run(body()) == in_one_process(model)


def test_processes_without_weights_answer_once_they_have_got_some(model, loop, tmp_path):
    """Nothing but ``config.json`` lies there."""
    folder = saved(model, TINY, tmp_path)
    (folder / "model.safetensors").unlink()
    empty = PoolEngine.from_directory(folder, num_processes=2, version=NO_WEIGHTS, **SLOTS)
    try:
        assert not empty.health().is_ready
        assert empty.health().weight_version == NO_WEIGHTS
        with pytest.raises(EngineError, match="has no weights yet"):
            loop.run(answer(empty, REQUESTS[0]))
        sent = classic_from_transformers(model.state_dict())
        loop.run(empty.update_weights(sent.items(), "0"))
        assert loop.run(answers(empty, REQUESTS)) == in_one_process(model)
    finally:
        loop.run(empty.close())


def test_what_cannot_be_is_refused(pool, loop, tmp_path):
    with pytest.raises(UserError, match="7 processes for 6 slots"):
        PoolEngine.from_directory(tmp_path, num_processes=7, **SLOTS)
    with pytest.raises(UserError, match="holds no answer to a grammar"):
        loop.run(answer(pool, Request("a", (1,), grammar="start: /x/")))
    with pytest.raises(UserError, match="are more than the 512"):
        loop.run(answer(pool, Request("a", (1,) * 500, LONG)))


def test_a_process_whose_step_fails_ends(model, loop, tmp_path):
    """It would have fewest requests in flight, and be sent all of them."""
    broken = Request("broken", (1, 2, 3), SamplingParams(temperature=1))
    object.__setattr__(broken.params, "temperature", "hot")

    async def body():
        own = PoolEngine.from_directory(saved(model, TINY, tmp_path), num_processes=2, **SLOTS)
        with pytest.raises(EngineError, match="a step failed"):
            await answer(own, broken)
        while not own.health().detail:
            await asyncio.sleep(0.01)
        found = await answers(own, REQUESTS[:3])
        await own.close()
        return found

    assert loop.run(asyncio.wait_for(body(), 100)) == {
        r.id: in_one_process(model)[r.id] for r in REQUESTS[:3]
    }


def test_a_process_that_dies_takes_its_own_requests_by_an_error(pool, loop):
    async def body():
        tasks = [
            asyncio.create_task(answer(pool, Request(str(i), (1, 2, i), LONG))) for i in range(6)
        ]
        await asyncio.sleep(0.1)
        os.kill(pool._members[0].process.pid, signal.SIGKILL)
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        rest = await answers(pool, REQUESTS)
        await pool.pause()
        await pool.resume()
        return ends, rest

    ends, rest = loop.run(body())
    failed = [end for end in ends if isinstance(end, EngineError)]
    assert len(failed) == 3
    assert "process 0 of the engine died (-9)" in str(failed[0])
    assert all(len(end) == 400 for end in ends if end not in failed)
    assert len(rest) == len(REQUESTS)
    health = pool.health()
    assert health.is_ready
    assert health.detail == "process 0 of 2 died"
    os.kill(pool._members[1].process.pid, signal.SIGKILL)
    with pytest.raises(EngineError):
        loop.run(answer(pool, REQUESTS[0]))
