"""A real vLLM as an engine of a fleet: started without weights, given them, killed, given them.

Dense, since its reload of experts on a CPU is wrong (``tests/vllm/test_vllm.py``). The oracle is
our engine with the same weights. Not exercised: several processes, GPUs, memory that sleep gives
back, NCCL and CUDA IPC.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal

import pytest
import torch

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
if not VLLM_PYTHON:
    pytest.skip("make test-vllm builds vLLM's environment and names it", allow_module_level=True)

from megatron_k2.engine.local.core import Core  # noqa: E402
from megatron_k2.engine.local.engine import LocalEngine  # noqa: E402
from megatron_k2.engine.local.weights import Weights  # noqa: E402
from megatron_k2.engine.protocol import Request, SamplingParams  # noqa: E402
from megatron_k2.engine.transfer.manifest import Counted  # noqa: E402
from megatron_k2.presets import get_preset  # noqa: E402
from megatron_k2.rl.cluster.fleet import Fleet  # noqa: E402
from megatron_k2.rl.cluster.roster import FleetPatience  # noqa: E402
from tests.engine.server.served import tokenizer_in  # noqa: E402
from tests.rl.cluster.supervising import Supervised, engines_file  # noqa: E402
from tests.vllm.engines import one_engine  # noqa: E402
from tests.vllm.test_vllm import START_SECONDS  # noqa: E402

pytestmark = pytest.mark.slow

SHAPE = {"num_layers": 2, "num_dense_layers": 2}
LENGTH = 128
REQUESTS = [
    Request(str(i), (5, 6, 7 + i), SamplingParams(max_tokens=12, temperature=0)) for i in range(4)
]


def drawn_weights(preset, seed):
    generator = torch.Generator().manual_seed(seed)
    held = Weights(preset, torch.float32, torch.device("cpu")).held
    return {n: 0.05 * torch.randn(place.shape, generator=generator) for n, place in held.items()}


async def answers(engine):
    async def one(request):
        async with contextlib.aclosing(engine.generate(request)) as outputs:
            return [token async for output in outputs for token in output.tokens]

    return await asyncio.gather(*map(one, REQUESTS))


def oracle(preset, weights):
    async def whole():
        held = Weights(preset, torch.float32, torch.device("cpu"))
        held.load(weights.items())
        engine = LocalEngine(Core(held, num_slots=4, max_length=LENGTH))
        found = await answers(engine)
        await engine.close()
        return found

    return asyncio.run(whole())


def require_same(found, expected, version):
    for ours, theirs in zip(found, expected, strict=True):
        assert [token.id for token in ours] == [token.id for token in theirs]
        assert {token.weight_version for token in ours} == {version}
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=2e-5)


async def push(fleet, weights, version):
    counted = Counted(weights.items(), version)
    await fleet.update_weights(counted, version, counted.manifest)


async def slept(fleet, run, weights, vocab_size):
    """Answers after a night: on a CPU nothing is freed, but its weights are told to be gone."""
    await fleet.sleep()
    other = await Fleet.open(run.meeting, 1, vocab_size=vocab_size)
    other.expect("2")
    assert fleet.needs_weights() == other.needs_weights() == (0,)
    await other.close()
    await fleet.wake("weights")
    await push(fleet, weights, "2")
    await fleet.wake("kv_cache")
    await fleet.resume()
    return await answers(fleet)


def test_vllm_comes_up_empty_is_given_weights_dies_and_is_given_them_again(tmp_path):
    vocab_size = tokenizer_in(tmp_path / "tokenizer").vocab_size
    shape = SHAPE | {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1}
    preset = dataclasses.replace(get_preset("k2-tiny"), **shape)
    first, second = (drawn_weights(preset, seed) for seed in (1, 2))
    model = {"tokenizer": str(tmp_path / "tokenizer"), **shape}
    row = one_engine(VLLM_PYTHON, model, LENGTH)

    async def scenario(run):
        patience = FleetPatience(look=0.2, away=2 * START_SECONDS)  # a start, and its weights
        fleet = await Fleet.open(run.meeting, 1, vocab_size=vocab_size, patience=patience)
        assert fleet.needs_weights() == (0,)
        fleet.expect("0")
        assert fleet.needs_weights() == (0,), "its own tag, 'default', is no version of ours"
        await push(fleet, first, "1")
        found = [await answers(fleet)]
        await push(fleet, second, "2")
        found.append(await answers(fleet))
        found.append(await slept(fleet, run, second, vocab_size))
        os.kill(run.engine(0).details["pid"], signal.SIGKILL)
        waiting = asyncio.create_task(answers(fleet))
        await asyncio.to_thread(run.engine, 0, 1, START_SECONDS)
        while fleet.needs_weights() != (0,):
            await asyncio.sleep(0.2)
        assert not waiting.done()
        await push(fleet, second, "2")
        found.append(await waiting)
        await fleet.close()
        return found

    with Supervised(tmp_path / "7.0", engines_file(tmp_path, row)) as run:
        run.engine(0, seconds=START_SECONDS)
        found = asyncio.run(scenario(run))
    require_same(found[0], oracle(preset, first), "1")
    for after in found[1:]:
        require_same(after, oracle(preset, second), "2")
