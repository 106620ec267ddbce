"""A fleet over real engines: killed mid-request, stopped, killed mid-update, come back without.

One supervisor keeps two servers of ours over random weights of a small model; the oracle is the
embedded engine with the same weights. The tests go on from one another's engines, whatever state
they are in. Not exercised: vLLM behind a fleet, engines on other machines.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
import time
import urllib.error
import urllib.request

import pytest
import torch

pytest.importorskip("aiohttp", reason="needs the extra remote")
pytest.importorskip("fastapi", reason="needs the extra serve")

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import (
    EngineError,
    Request,
    SamplingParams,
    UpdateCode,
    UpdateError,
)
from megatron_k2.engine.remote.endpoints import Endpoint
from megatron_k2.engine.remote.engine import RemoteEngine
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.engine.transfer.buckets import buckets_of
from megatron_k2.engine.transfer.manifest import Counted
from megatron_k2.errors import UserError
from megatron_k2.presets import get_preset
from megatron_k2.rl.cluster.fleet import Fleet
from megatron_k2.rl.cluster.roster import FleetPatience
from tests.engine.server.served import tokenizer_in
from tests.rl.cluster.supervising import Supervised, engines_file

SHAPE = {"num_layers": 2, "vocab_size": 512}
PRESET = dataclasses.replace(get_preset("k2-tiny"), **SHAPE)
pytestmark = pytest.mark.slow

LENGTH, BUCKET_BYTES = 512, 200_000
QUICK = FleetPatience(look=0.1, silent=6, away=180, again=0.05)


def drawn_weights(seed):
    """By Hugging Face's names; norms far from one."""
    generator = torch.Generator().manual_seed(seed)
    held = Weights(PRESET, torch.float32, torch.device("cpu")).held
    return {
        name: 0.05 * torch.randn(place.shape, generator=generator) for name, place in held.items()
    }


def oracle(weights, requests):
    """What an engine that nothing happens to answers."""

    async def whole():
        held = Weights(PRESET, torch.float32, torch.device("cpu"))
        held.load(weights.items())
        core = Core(held, num_slots=8, max_length=LENGTH, version="1", is_batch_invariant=True)
        engine = LocalEngine(core)
        found = await asyncio.gather(*(answer(engine, each) for each in requests))
        await engine.close()
        return found

    return asyncio.run(whole())


async def answer(engine, request):
    tokens = []
    async with contextlib.aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            tokens += output.tokens
            reason = output.finish_reason
    return [(token.id, token.logprob) for token in tokens], reason


def asked(count, max_tokens, first=0):
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0)
    return [
        Request(f"{i}", (5, 6, 7 + i), dataclasses.replace(params, seed=i))
        for i in range(first, first + count)
    ]


async def push(fleet, weights, version):
    counted = Counted(weights.items(), version)
    await fleet.update_weights(counted, version, counted.manifest)
    return counted


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The oracle's; two wait for each other where the engines have the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    tokenizer_in(folder / "tokenizer")
    row = {
        "backend": "local",
        "replicas": 2,
        "model": {"preset": "k2-tiny", "tokenizer": str(folder / "tokenizer")} | SHAPE,
        "options": {"num_slots": 8, "max_length": LENGTH, "batch_invariant": True},
        "patience": {"restarts": 20},
    }
    with Supervised(folder / "7.0", engines_file(folder, row)) as supervised:
        yield supervised


@pytest.fixture(scope="module")
def first():
    return drawn_weights(1)


def scenario(run, body, patience=QUICK):
    """``body(fleet)`` of a fleet over both engines."""

    async def whole():
        fleet = await Fleet.open(
            run.meeting,
            2,
            vocab_size=PRESET.vocab_size,
            seconds=90,
            patience=patience,
            bucket_bytes=BUCKET_BYTES,
        )
        try:
            return await asyncio.wait_for(body(fleet), 90)
        finally:
            await fleet.close()

    return asyncio.run(whole())


def kill(run, index, number=signal.SIGKILL):
    """Send an engine a signal; the attempt that follows."""
    address = run.engine(index)
    os.kill(address.details["pid"], number)
    return address.attempt + 1


async def back(fleet, run, index, attempt):
    """Wait until an engine has come back, as the fleet sees it."""
    await asyncio.to_thread(run.engine, index, attempt)
    end = time.monotonic() + 120
    while index not in fleet.needs_weights():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


def status(url, token=None, body=b"{}"):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as got:
            return got.status
    except urllib.error.HTTPError as error:
        return error.code


def test_engines_start_empty_and_answer_after_the_first_round(run, first, monkeypatch):
    requests, written, write = asked(6, 12), [], BucketFolder.write

    def counting(folder, bucket):
        written.append(folder.directory)
        return write(folder, bucket)

    monkeypatch.setattr(BucketFolder, "write", counting)

    async def body(fleet):
        assert fleet.limits[:2] == (PRESET.vocab_size, LENGTH)
        assert fleet.needs_weights() == (0, 1)
        assert not fleet.health().is_ready
        assert fleet.health().weight_version == "none"
        url = run.engine(0).url
        token = run.meeting.token()
        completion = b'{"prompt": [1], "max_tokens": 1}'
        assert status(f"{url}/health", body=None) == 503
        assert status(f"{url}/v1/completions", token, completion) == 503, "no weights"
        for verb in ("start_weight_update", "pause", "abort_requests"):
            assert status(f"{url}/{verb}") == 401
            assert status(f"{url}/{verb}", "another token") == 401
        counted = await push(fleet, first, "1")
        assert counted.num_bytes == sum(t.numel() * 4 for t in first.values()), "drawn once"
        assert len(written) == len(list(buckets_of(first.items(), BUCKET_BYTES))), "once for both"
        assert list(written[0].iterdir()) == [], "nothing is left"
        assert fleet.needs_weights() == ()
        assert fleet.health()[:2] == (True, "")
        return await asyncio.gather(*(answer(fleet, each) for each in requests))

    assert scenario(run, body) == oracle(first, requests)


def test_requests_of_one_that_is_killed_are_answered_by_the_other(run, first):
    requests = asked(8, 400)

    async def body(fleet):
        fleet.expect("1")
        tasks = [asyncio.create_task(answer(fleet, each)) for each in requests]
        await asyncio.sleep(0.4)
        assert not any(task.done() for task in tasks)
        attempt = kill(run, 0)
        found = await asyncio.gather(*tasks)
        await back(fleet, run, 0, attempt)
        assert fleet.needs_weights() == (0,)
        assert fleet.health().is_ready, "the other one has them"
        before = run.engine(1)
        await push(fleet, first, "1")
        assert fleet.needs_weights() == ()
        assert run.engine(1) == before
        return found

    assert scenario(run, body) == oracle(first, requests)


def test_requests_of_one_that_hangs_are_answered_by_the_other(run, first):
    requests = asked(8, 100)

    async def body(fleet):
        fleet.expect("1")
        await fleet.look()
        attempt = kill(run, 1, signal.SIGSTOP)
        found = await asyncio.gather(*(answer(fleet, each) for each in requests))
        await back(fleet, run, 1, attempt)
        await push(fleet, first, "1")
        return found

    assert scenario(run, body) == oracle(first, requests)
    assert "is wedged" in run.meeting.attempts("replica.1")[-1].why


def test_an_engine_killed_in_a_round_is_left_out_and_serves_no_mixture(run):
    second, requests = drawn_weights(2), asked(4, 6)

    async def body(fleet):
        fleet.expect("1")
        await fleet.look()
        attempts = []

        def dying():
            for number, pair in enumerate(second.items()):
                if number == len(second) // 2:
                    attempts.append(kill(run, 0))
                yield pair

        counted = Counted(dying(), "2")
        await fleet.update_weights(counted, "2", counted.manifest)
        assert fleet.health()[:4:3] == (True, "2")
        found = await asyncio.gather(*(answer(fleet, each) for each in requests))
        await back(fleet, run, 0, attempts[0])
        assert fleet.needs_weights() == (0,)
        await push(fleet, second, "2")
        assert fleet.needs_weights() == ()
        return found

    assert scenario(run, body) == oracle(second, requests)


def test_a_round_that_no_engine_takes_is_an_error_and_nobody_is_asked(run):
    second = drawn_weights(2)

    async def body(fleet):
        fleet.expect("2")
        await fleet.look()
        torn = dict(list(drawn_weights(3).items())[:-1])
        with pytest.raises(UpdateError, match=r"no engine took weights '3'.*never came") as no:
            await push(fleet, torn, "3")
        assert no.value.code is UpdateCode.WEIGHTS
        assert not fleet.health().is_ready
        await push(fleet, second, "2")
        return await answer(fleet, asked(1, 4)[0])

    assert [scenario(run, body)] == oracle(second, asked(1, 4))


def test_another_version_is_not_asked(run):
    async def body(fleet):
        fleet.expect("7")
        await fleet.look()
        assert fleet.needs_weights() == (0, 1)
        with pytest.raises(EngineError, match=r"for 0\.3 seconds: engine 0: .*weights '2'"):
            await answer(fleet, asked(1, 4)[0])
        assert await careless(run) == {"2"}
        fleet.expect("2")
        return await answer(fleet, asked(1, 4)[0])

    patience = dataclasses.replace(QUICK, away=0.3)
    assert [scenario(run, body, patience)] == oracle(drawn_weights(2), asked(1, 4))


async def careless(run):
    """The mistake: whoever is up is asked; the versions of what it says."""
    endpoint = Endpoint(run.engine(0).url, key_file=run.meeting.token_path)
    engine = await RemoteEngine.connect([endpoint], vocab_size=PRESET.vocab_size)
    outputs = [output async for output in engine.generate(asked(1, 4)[0])]
    await engine.close()
    return {token.weight_version for output in outputs for token in output.tokens}


def test_pausing_aborting_leaving(run):
    async def body(fleet):
        fleet.expect("2")
        await fleet.look()
        await fleet.pause("keep")
        assert fleet.health().is_paused
        task = asyncio.create_task(answer(fleet, asked(1, 9)[0]))
        await asyncio.sleep(0.2)
        assert not task.done()
        with pytest.raises(UserError, match="in flight already"):
            await answer(fleet, asked(1, 9)[0])
        await fleet.abort(["0"])
        assert (await task)[1] == "abort"
        left = asyncio.create_task(answer(fleet, asked(1, 9)[0]))
        await asyncio.sleep(0.1)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        await fleet.resume()
        return await answer(fleet, asked(1, 9)[0])

    assert [scenario(run, body)] == oracle(drawn_weights(2), asked(1, 9))


def test_with_all_of_them_gone_it_waits_and_then_says_who(run):
    async def body(fleet):
        fleet.expect("2")
        await fleet.look()
        for index in (0, 1):
            kill(run, index)
        with pytest.raises(EngineError, match=r"no engine could be asked.*engine 0: .*engine 1: "):
            await answer(fleet, asked(1, 4)[0])
        health = fleet.health()
        assert not health.is_ready
        assert "engine 1" in health.detail

    scenario(run, body, dataclasses.replace(QUICK, away=0.5))
