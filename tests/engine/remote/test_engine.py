"""A remote engine over our own server is the engine behind it; new weights reach all or none."""

import asyncio
import contextlib

import pytest
import torch

pytest.importorskip("aiohttp", reason="needs the extra remote")
pytest.importorskip("fastapi", reason="needs the extra serve")

from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.protocol import (
    EngineError,
    Output,
    Request,
    SamplingParams,
    Token,
    UpdateCode,
    UpdateError,
)
from megatron_k2.engine.remote.answers import output_of, tagged
from megatron_k2.engine.remote.endpoints import Endpoint, Policy
from megatron_k2.engine.remote.engine import RemoteEngine
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.engine.transfer.manifest import Counted
from megatron_k2.errors import UserError
from tests.engine.local.models import TINY, reference, tokens, weights_of
from tests.engine.server.served import served, tokenizer_in

QUICK = Policy(attempts=2, backoff_seconds=0.01, deadline_seconds=20)


@pytest.fixture(scope="module")
def model():
    return reference(TINY)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def scenario(model, tokenizer, tmp_path, body, count=1):
    """``body(engine, weights)`` of a remote engine over ``count`` servers, and their weights."""
    held = [weights_of(model, TINY) for _ in range(count)]
    folder = BucketFolder(tmp_path)

    async def whole(urls):
        engine = await RemoteEngine.connect(
            [Endpoint(url) for url in urls], vocab_size=96, policy=QUICK, bucket_bytes=30_000
        )
        try:
            return await asyncio.wait_for(body(engine, held), 60)
        finally:
            await engine.close()

    with contextlib.ExitStack() as stack:
        urls = [
            stack.enter_context(
                served(
                    lambda weights=weights: LocalEngine(Core(weights, num_slots=2, max_length=64)),
                    tokenizer,
                    has_admin=True,
                    weights=folder,
                )
            )[0]
            for weights in held
        ]
        return asyncio.run(whole(urls))


async def answer(engine, prompt, **params):
    request = Request("r", tuple(prompt), SamplingParams(**params))
    found = [output async for output in engine.generate(request)]
    return Output(
        tuple(t for output in found for t in output.tokens),
        tuple(t for output in found for t in output.prompt_tokens),
        found[-1].finish_reason,
        found[-1].stop_id,
    )


ASKED = [
    {"temperature": 0, "max_tokens": 9},
    {"seed": 7, "max_tokens": 9, "top_p": 0.9, "logprobs": 3, "prompt_logprobs": 2},
    {"seed": 7, "max_tokens": 5, "returns_routed_experts": True},
    {"seed": 7, "max_tokens": 20, "stop_token_ids": tuple(range(30))},
    {"max_tokens": 0, "prompt_logprobs": 0},
]


def essence(output):
    """What both must agree on: the version of a prompt's tokens does not travel."""
    return (
        [(t.id, t.logprob, dict(t.top), t.routed_experts) for t in output.prompt_tokens],
        [(t.id, t.logprob, dict(t.top), t.routed_experts, t.weight_version) for t in output.tokens],
        output.finish_reason,
        output.stop_id,
    )


def test_answers_are_the_engines_own(model, tokenizer, tmp_path):
    async def remote(engine, _held):
        assert engine.limits[:2] == (96, 64)
        return [await answer(engine, tokens(6), **params) for params in ASKED]

    async def direct():
        engine = LocalEngine(Core(weights_of(model, TINY), num_slots=2, max_length=64))
        found = [await answer(engine, tokens(6), **params) for params in ASKED]
        await engine.close()
        return found

    far = scenario(model, tokenizer, tmp_path, remote)
    for asked, ours, theirs in zip(ASKED, asyncio.run(direct()), far, strict=True):
        if asked.get("returns_routed_experts") and not ours.prompt_tokens[0].logprob:
            # scores of the prompt were not asked for, and do not travel
            assert [t.routed_experts for t in ours.prompt_tokens] == [
                t.routed_experts for t in theirs.prompt_tokens
            ]
            assert essence(ours)[1:] == essence(theirs)[1:]
        else:
            assert essence(ours) == essence(theirs), asked


def test_a_grammar_is_refused_and_nothing_sent(model, tokenizer, tmp_path):
    async def body(engine, _held):
        held_to_it = Request("r", (1, 2), SamplingParams(max_tokens=1), "start: /x/")
        with pytest.raises(UserError, match=r"a grammar is not sent.*response_format"):
            await anext(engine.generate(held_to_it))
        assert engine.health().num_running == 0
        assert (await answer(engine, (1, 2), max_tokens=1)).tokens, "without one it goes"

    scenario(model, tokenizer, tmp_path, body)


def new_weights(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in classic_from_transformers(model.state_dict()).items()
    }


async def push(engine, sent, version):
    counted = Counted(sent.items(), version)
    await engine.update_weights(counted, version, counted.manifest)


def test_new_weights_reach_every_endpoint(model, tokenizer, tmp_path):
    async def body(engine, held):
        for number in range(2):
            sent = new_weights(model, number)
            await push(engine, sent, f"v{number}")
            for weights in held:
                assert all(sent[name].equal(place) for name, place in weights.held.items())
            assert engine.health()[:4:3] == (True, f"v{number}")
            found = await answer(engine, tokens(4), max_tokens=2)
            assert {token.weight_version for token in found.tokens} == {f"v{number}"}

    scenario(model, tokenizer, tmp_path, body, count=2)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_failed_round_is_told_by_its_code_and_answers_stop(model, tokenizer, tmp_path):
    async def body(engine, _held):
        sent = new_weights(model, 0)
        with pytest.raises(UpdateError, match="never came") as failed:
            await push(engine, dict(list(sent.items())[:-1]), "1")
        with pytest.raises(EngineError, match="'1' failed"):
            await answer(engine, tokens(4))
        assert not engine.health().is_ready
        await push(engine, sent, "2")
        assert (await answer(engine, tokens(4))).tokens
        return failed.value.code

    assert scenario(model, tokenizer, tmp_path, body, count=2) is UpdateCode.WEIGHTS


def test_an_endpoint_that_keeps_the_old_tag_is_found(model, tokenizer, tmp_path):
    async def body(engine, _held):
        post = engine._client.once

        async def deaf(state, method, path, body=None):
            """Says yes to everything."""
            if path == "/init_weight_transfer_engine" or method == "GET":
                return await post(state, method, path, body)
            return {}

        engine._client.once = deaf
        with pytest.raises(UpdateError, match="serves '0', not '1'") as failed:
            await push(engine, new_weights(model, 0), "1")
        return failed.value.code

    assert scenario(model, tokenizer, tmp_path, body) is UpdateCode.VERSION


def test_tokens_of_a_server_that_says_no_version_have_the_one_that_it_was_given():
    found = tagged(Output((Token(1, -0.1), Token(2, -0.2, (), "6"))), "7")
    assert [token.weight_version for token in found.tokens] == ["7", "6"]


def test_leaving_early_pausing_and_aborting(model, tokenizer, tmp_path):
    async def body(engine, _held):
        await engine.pause("keep")
        assert engine.health().is_paused
        task = asyncio.create_task(answer(engine, tokens(4), max_tokens=9))
        await asyncio.sleep(0.1)
        assert not task.done()
        with pytest.raises(UserError, match="in flight already"):
            await answer(engine, tokens(4))
        await engine.abort(["other"])
        await engine.abort(["r"])
        assert (await task).finish_reason == "abort"
        left = asyncio.create_task(answer(engine, tokens(4), max_tokens=9))
        await asyncio.sleep(0.05)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        await engine.resume()
        return (await answer(engine, tokens(4), max_tokens=3)).finish_reason

    assert scenario(model, tokenizer, tmp_path, body) == "length"


def test_what_cannot_be_is_refused(model, tokenizer, tmp_path):
    async def body(engine, _held):
        with pytest.raises(UserError, match="with a manifest"):
            await engine.update_weights([], "1")
        with pytest.raises(UserError, match="are more than the 64 of a slot"):
            await answer(engine, tokens(60), max_tokens=9)

    scenario(model, tokenizer, tmp_path, body)
    with pytest.raises(EngineError, match="/v1/models: Client"):
        asyncio.run(RemoteEngine.connect([Endpoint("http://127.0.0.1:9")], vocab_size=9))


def test_an_answer_without_recorded_routes_has_none_and_a_torn_one_is_refused():
    choice = {
        "finish_reason": "length",
        "token_ids": [5],
        "logprobs": {"token_logprobs": [-1.0]},
        "routed_experts": None,
    }
    request = Request("r", (1, 2), SamplingParams(max_tokens=1, returns_routed_experts=True))
    output = output_of({"choices": [choice]}, request)
    assert [token.routed_experts for token in output.tokens] == [None]
    for torn in ({**choice, "routed_experts": "AAAA"}, {"token_ids": [5]}):
        with pytest.raises(EngineError, match="not as vLLM's"):
            output_of({"choices": [torn]}, request)
