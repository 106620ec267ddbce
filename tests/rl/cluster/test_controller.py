"""The controller's verbs over HTTP, and rank 0's client of them: who waits, fails, dies."""

import asyncio
import contextlib

import pytest
from aiohttp import ClientSession

from megatron_k2.engine.protocol import EngineError
from megatron_k2.errors import UserError
from megatron_k2.rl.cluster import controller as module
from megatron_k2.rl.cluster.controller import MOST_TRIES, Controller, make_app
from megatron_k2.rl.cluster.remote_side import Asker, Controlled
from megatron_k2.rl.cluster.rendezvous import Address
from megatron_k2.rl.cluster.serving import serving as listening
from megatron_k2.rl.collected import metrics
from megatron_k2.rl.handed_out import LedgerReader
from megatron_k2.rl.loop import Collected
from megatron_k2.rl.waiting import LostError
from tests.rl.collecting import made

HOST, TOKEN = "127.0.0.1", "secret"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr("megatron_k2.rl.cluster.remote_side._PAUSE_SECONDS", 0.01)


class Sampling:
    """Over scripted answers into a ledger; what is in ``fails`` is raised first."""

    def __init__(self, folder, fails=(), seconds=0.0):
        self.made, self.fails, self.seconds = made(folder), list(fails), seconds
        self.begun, self.commits, self.is_closed = [], [], False

    async def collect(self, iteration, version):
        self.begun.append((iteration, version))
        self.made.engine.set("", version)
        await asyncio.sleep(self.seconds)
        if self.fails:
            raise self.fails.pop(0)
        found = await self.made.collector.collect(iteration, version)
        position = self.made.ledger.position(iteration + 1)
        return Collected(found.groups, metrics(found), position)

    async def committed(self, iteration):
        self.commits.append(iteration)

    async def close(self):
        self.is_closed = True
        self.made.close()


class Fleet:
    """Of rank 0: notes what it was told."""

    def __init__(self):
        self.told = []

    async def some_up(self):
        self.told.append("some up")

    async def wake(self, tag):
        self.told.append(f"wake {tag}")

    async def resume(self):
        self.told.append("resume")

    async def sleep(self):
        self.told.append("sleep")

    async def close(self):
        self.told.append("close")


class Lacking:
    """Engines that lack weights, question by question; none afterwards."""

    def __init__(self, *said):
        self.said, self.asked = list(said), []

    async def __call__(self, version):
        self.asked.append(version)
        return self.said.pop(0) if self.said else ""


@contextlib.asynccontextmanager
async def serving(sampling, lacking, tell=print):
    """A controller behind HTTP; its address."""
    controller = Controller(sampling, lacking, tell)
    async with listening(lambda: make_app(controller, TOKEN), HOST) as port:
        yield Address("job.0", "controller", 0, HOST, port, 77, 0)
    await controller.close()


def run(folder, body, *, lacking=None, tell=print, **more):
    """``body`` with a client, its ledger's reader beside the writer; what the sampling saw."""
    sampling, lacking = Sampling(folder, **more), lacking or Lacking()

    async def whole():
        async with serving(sampling, lacking, tell) as address:
            side = Controlled(Asker(address, TOKEN), LedgerReader(folder), Fleet(), None)
            try:
                return await body(side)
            finally:
                await side.close()

    return asyncio.run(asyncio.wait_for(whole(), 60)), sampling


def test_what_the_controller_collects_is_read_from_the_ledger(tmp_path):
    async def body(side):
        found = [await side.collect(number, number) for number in range(3)]
        await side.committed(1)
        return found

    found, sampling = run(tmp_path / "one", body, seconds=0.2)
    assert sampling.begun == [(0, 0), (1, 1), (2, 2)], "asked many times, begun once each"
    assert sampling.commits == [1]
    assert sampling.is_closed
    alone = made(tmp_path / "other")
    for number, each in enumerate(found):
        expected = alone.collect(number)
        assert each.groups == expected.groups
        assert each.metrics == metrics(expected)
        assert each.position == alone.ledger.position(number + 1)


def test_engines_without_weights_are_said_before_anything_is_sampled(tmp_path):
    async def body(side):
        return [await side.collect(0, 3) for _ in range(3)]

    told = []
    lacking = Lacking("engine 0, engine 1", "engine 1")
    found, sampling = run(tmp_path, body, lacking=lacking, tell=told.append)
    assert [each is None for each in found] == [True, True, False]
    assert sampling.begun == [(0, 3)]
    assert set(lacking.asked) == {"3"}
    assert told == [
        "iteration 0: weights of version 3 are due: engine 0, engine 1",
        "iteration 0: weights of version 3 are due: engine 1",
    ]


def test_an_engine_that_never_takes_its_weights_is_gone_on_without(tmp_path):
    async def body(side):
        found = []
        while (last := await side.collect(0, 0)) is None:
            found.append(last)
        return len(found)

    found, _ = run(tmp_path, body, lacking=Lacking(*["engine 1"] * 100))
    assert found == MOST_TRIES


def test_rollouts_whose_engines_failed_are_begun_again(tmp_path):
    async def body(side):
        return await side.collect(0, 0)

    fails = [EngineError("engine 0 has gone")] * 2
    found, sampling = run(tmp_path, body, fails=fails)
    assert sampling.begun == [(0, 0)] * 3
    assert found.groups


@pytest.mark.parametrize(
    ("fails", "kind", "said"),
    [
        ([UserError("--tasks x: no such file")], UserError, r"^--tasks x: no such file$"),
        ([RuntimeError("a fault of ours")], LostError, "failed: RuntimeError: a fault of ours"),
        ([EngineError("none is left")] * MOST_TRIES, LostError, "EngineError: none is left"),
    ],
)
def test_what_cannot_be_mended_ends_the_run_with_a_sentence(tmp_path, fails, kind, said):
    async def body(side):
        await side.collect(0, 0)

    with pytest.raises(kind, match=said):
        run(tmp_path, body, fails=fails)


def test_a_controller_that_has_gone_is_named(tmp_path):
    async def body():
        async with serving(Sampling(tmp_path, seconds=5), Lacking()) as address:
            side = Controlled(Asker(address, TOKEN), LedgerReader(tmp_path), Fleet(), None)
            asking = asyncio.create_task(side.collect(0, 0))
            await asyncio.sleep(0.3)
        with pytest.raises(LostError, match=r"the controller \(host 127.0.0.1, pid 77\) gives no"):
            await asking
        await side.close()

    asyncio.run(body())


def test_one_that_is_silent_is_named_too(tmp_path):
    async def body():
        server = await asyncio.start_server(lambda *_: asyncio.sleep(30), HOST, 0)
        port = server.sockets[0].getsockname()[1]
        asker = Asker(Address("job.0", "controller", 0, HOST, port, 77, 0), TOKEN, 0.2)
        with pytest.raises(LostError, match=r"gives no answer \(TimeoutError\)"):
            await asker.ask("collect", iteration=0, version=0)
        await asker.close()
        server.close()

    asyncio.run(body())


def test_without_the_token_or_with_another_body_nothing_is_done(tmp_path):
    sampling = Sampling(tmp_path)

    async def body():
        async with serving(sampling, Lacking()) as address, ClientSession() as client:
            url, key = f"{address.url}/collect", {"Authorization": f"Bearer {TOKEN}"}
            found = []
            for headers, content in (
                ({}, b'{"iteration": 0, "version": 0}'),
                ({"Authorization": "Bearer other"}, b'{"iteration": 0, "version": 0}'),
                (key, b"{"),
                (key, b'{"iteration": 0}'),
            ):
                async with client.post(url, headers=headers, data=content) as answer:
                    found.append(answer.status)
            return found

    assert asyncio.run(body()) == [401, 401, 400, 400]
    assert sampling.begun == []


def test_engines_on_the_trainers_gpus_are_awake_while_it_is_not(tmp_path):
    fleet = Fleet()

    async def body():
        lacking = Lacking("engine 1")
        async with serving(Sampling(tmp_path), lacking) as address:
            reader = LedgerReader(tmp_path)
            side = Controlled(Asker(address, TOKEN), reader, fleet, None, is_shared=True)
            await side.ready()
            assert await side.collect(0, 0) is None
            await side.ready()
            assert (await side.collect(0, 0)).groups
            await side.close()

    asyncio.run(body())
    awake = ["some up", "wake weights", "wake kv_cache", "resume", "sleep"]
    assert fleet.told == [*awake, *awake, "close"]
