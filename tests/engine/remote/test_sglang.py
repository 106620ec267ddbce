"""SGLang's dialect against a stand-in: no build of SGLang runs on a CPU, so nothing here is SGLang.

The stand-in answers in the form that SGLang's source describes, with an embedded engine's numbers;
what comes out on this side must be that engine's own answer.
"""

import asyncio
import contextlib
from dataclasses import replace

import pytest

pytest.importorskip("aiohttp", reason="needs the extra remote")

from aiohttp.test_utils import TestServer

from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.protocol import EngineError, Request, SamplingParams, UpdateError
from megatron_k2.engine.remote.dialects import dialect_of
from megatron_k2.engine.remote.endpoints import Endpoint, Policy, State
from megatron_k2.engine.remote.engine import RemoteEngine
from megatron_k2.engine.remote.sglang import output_of
from megatron_k2.engine.transfer.manifest import Counted
from megatron_k2.errors import UserError
from tests.engine.local.models import TINY, reference, weights_of
from tests.engine.remote.sglang_stand_in import StandIn

QUICK = Policy(attempts=2, backoff_seconds=0.01, deadline_seconds=20)
PROMPT = tuple(range(4, 12))


@pytest.fixture(scope="module")
def model():
    return reference(TINY)


@contextlib.asynccontextmanager
async def remote(model, weights_dir=None):
    """A remote engine, its stand-in, and another engine of the same weights in this process."""
    engines = [
        LocalEngine(Core(weights_of(model, TINY), num_slots=2, max_length=64)) for _ in range(2)
    ]
    stand_in = StandIn(engines[0])
    async with TestServer(stand_in.app) as server:
        endpoint = Endpoint(str(server.make_url("")), api="sglang", weights_dir=weights_dir)
        engine = await RemoteEngine.connect(
            [endpoint], vocab_size=96, policy=QUICK, bucket_bytes=30_000
        )
        try:
            yield engine, stand_in, engines[1]
        finally:
            await engine.close()
            for each in engines:
                await each.close()


async def answer(engine, **params):
    tokens, prompt, last = [], [], None
    async for output in engine.generate(Request("r", PROMPT, SamplingParams(**params))):
        tokens += output.tokens
        prompt += output.prompt_tokens
        last = output
    plain = [replace(t, weight_version="") for t in (*prompt, *tokens)]
    return plain, last.finish_reason, last.stop_id


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, "max_tokens": 9},
        {"seed": 7, "max_tokens": 9, "top_p": 0.9, "logprobs": 3, "prompt_logprobs": 3},
        {"seed": 7, "max_tokens": 20, "top_k": 5, "stop_token_ids": tuple(range(30))},
        {"max_tokens": 0, "prompt_logprobs": 0},
    ],
)
def test_answers_are_the_engines_own(model, params):
    async def both():
        async with remote(model) as (engine, _, own):
            return await answer(engine, **params), await answer(own, **params)

    theirs, ours = asyncio.run(both())
    assert theirs == ours


def test_a_round_is_a_directory_that_it_reads_while_paused(model, tmp_path):
    pairs = [(n, 0.5 * t) for n, t in classic_from_transformers(model.state_dict()).items()]

    async def run():
        async with remote(model, tmp_path) as (engine, stand_in, own):
            counted = Counted(pairs, "7")
            await engine.update_weights(counted, "7", counted.manifest)
            await own.update_weights(pairs, "7")
            assert not stand_in.is_paused
            assert engine.health().weight_version == "7"
            same = await answer(engine, temperature=0), await answer(own, temperature=0)
            return stand_in.read, same

    read, (theirs, ours) = asyncio.run(run())
    assert read == [sorted(name for name, _ in pairs)]
    assert theirs == ours
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fails", "claims", "said"),
    [("Failed to load", None, "Failed to load"), ("", "6", "serves '6', not '7'")],
)
def test_a_round_that_failed_leaves_it_paused_and_unasked(model, tmp_path, fails, claims, said):
    pairs = list(classic_from_transformers(model.state_dict()).items())

    async def run():
        async with remote(model, tmp_path) as (engine, stand_in, _):
            stand_in.fails, stand_in.claims = fails, claims
            counted = Counted(pairs, "7")
            with pytest.raises(UpdateError, match=said):
                await engine.update_weights(counted, "7", counted.manifest)
            assert stand_in.is_paused
            with pytest.raises(EngineError, match="update to weights '7' failed"):
                await answer(engine, temperature=0)

    asyncio.run(run())
    assert not list(tmp_path.iterdir())


def test_what_it_cannot_do_is_refused(model):
    async def run():
        async with remote(model) as (engine, stand_in, _):
            with pytest.raises(UserError, match="routed experts"):
                await answer(engine, returns_routed_experts=True)
            with pytest.raises(UserError, match="pause mode 'wait'"):
                await engine.pause("wait")
            await engine.pause("keep")
            assert stand_in.is_paused
            await engine.resume()
            assert not stand_in.is_paused
            counted = Counted([], "7")
            with pytest.raises(UserError, match="weights_dir"):
                await engine.update_weights(counted, "7", counted.manifest)

    asyncio.run(run())


def test_endpoints_of_two_kinds_are_not_one_engine():
    states = [State(Endpoint("http://a:1", api="sglang")), State(Endpoint("http://b:1"))]
    with pytest.raises(UserError, match="speak openai and sglang"):
        dialect_of(states)


def test_an_answer_of_another_prompt_is_none():
    request = Request("r", PROMPT, SamplingParams(prompt_logprobs=0))
    rows = [[-0.5, 3, None]]
    about = {
        "output_token_logprobs": rows,
        "input_token_logprobs": [[None, i + 1, None] for i in PROMPT],
        "finish_reason": {"type": "length"},
    }
    with pytest.raises(EngineError, match="another prompt"):
        output_of({"meta_info": about}, request)
