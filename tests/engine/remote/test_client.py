"""The client against a fake server that fails: a small ``tests/campaigns/remote_crowd.py``."""

import asyncio
import logging
import time

import pytest

pytest.importorskip("aiohttp", reason="needs the extra remote")

from megatron_k2.engine.protocol import EngineError
from megatron_k2.engine.remote import client as client_module
from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.endpoints import Endpoint, Policy
from megatron_k2.errors import UserError
from tests.campaigns.remote_crowd import crowd
from tests.engine.remote.faulty_server import RETRY_AFTER, Server, answer_of

QUICK = Policy(concurrency=32, backoff_seconds=0.01, attempt_seconds=5, deadline_seconds=30)


def scenario(body, *shares, policy=QUICK, **endpoint):
    """``body(client, servers)`` with a fake server for each of ``shares``."""

    async def whole():
        servers = [Server(each) for each in shares]
        listening = [await server.listen() for server in servers]
        ports = [each.sockets[0].getsockname()[1] for each in listening]
        urls = [f"http://127.0.0.1:{port}/v1" for port in ports]
        try:
            async with Client([Endpoint(url, **endpoint) for url in urls], policy) as client:
                return await asyncio.wait_for(body(client, servers), 60)
        finally:
            for each in listening:
                each.close()

    return asyncio.run(whole())


async def ask(client, name, **more):
    found = await client.post("/v1/completions", {"id": name}, **more)
    return found["choices"][0]["text"]


def test_every_request_is_answered_once_whatever_fails():
    async def body(client, servers):
        urls = [state.endpoint.url for state in client.endpoints.states]
        policy = Policy(concurrency=64, backoff_seconds=0.01)
        counts, _, _ = await crowd(urls, 400, policy, seed=1)
        return counts, servers[0].counts

    counts, served = scenario(body, {"errors": 0.2, "busy": 0.1, "cut": 0.1, "slow": 0.005})
    assert counts == {"right": 400}
    assert min(served[fault] for fault in ("errors", "busy", "cut", "slow")) > 0


def test_retry_after_is_waited_for():
    async def body(client, _servers):
        begin = time.perf_counter()
        with pytest.raises(EngineError, match=r"no answer in 2 attempts; .*status 429: too many"):
            await ask(client, "a")
        return time.perf_counter() - begin

    policy = Policy(attempts=2, backoff_seconds=1e-6)
    assert scenario(body, {"busy": 1.0}, policy=policy) >= RETRY_AFTER


def test_a_deadline_is_kept_and_says_what_was_last():
    async def body(client, _servers):
        begin = time.perf_counter()
        with pytest.raises(EngineError, match=r"no answer in 0\.3 s; at last .*500: it broke"):
            await ask(client, "a", seconds=0.3)
        return time.perf_counter() - begin

    policy = Policy(attempts=1000, backoff_seconds=0.02, most_backoff_seconds=0.02)
    assert scenario(body, {"errors": 1.0}, policy=policy) < 1


def test_a_dead_endpoint_does_not_lose_a_request():
    async def body(client, servers):
        answers = await asyncio.gather(*(ask(client, str(i)) for i in range(60)))
        return answers, [server.counts["answered"] for server in servers]

    answers, counts = scenario(body, {"errors": 1.0}, {})
    assert answers == [answer_of({"id": str(i)}) for i in range(60)]
    assert counts == [0, 60]


def test_no_more_than_so_many_are_under_way():
    most = 0

    async def body(client, _servers):
        async def watched():
            nonlocal most
            while True:
                most = max(most, client.endpoints.states[0].num_running)
                await asyncio.sleep(0)

        watch = asyncio.create_task(watched())
        await asyncio.gather(*(ask(client, str(i)) for i in range(40)))
        watch.cancel()

    scenario(body, {}, policy=Policy(concurrency=5))
    assert most == 5


def test_a_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("K2_TEST_KEY", "open-sesame")

    async def body(client, servers):
        await ask(client, "a")
        servers[0].shares = {"errors": 1.0}
        with pytest.raises(EngineError) as failed:
            await ask(client, "b")
        return str(failed.value) + repr(client.endpoints.states), servers[0].keys

    with caplog.at_level(logging.DEBUG):
        policy = Policy(attempts=2, backoff_seconds=0.001)
        shown, keys = scenario(body, {}, policy=policy, key_env="K2_TEST_KEY")
    assert keys == {b"Authorization: Bearer open-sesame"}
    assert "127.0.0.1" in caplog.text
    assert "open-sesame" not in shown + caplog.text


def test_a_request_that_is_wrong_is_not_repeated():
    async def refuse(reader, writer):
        calls.append(await reader.readuntil(b"\r\n\r\n"))
        content = b'{"error": {"message": "prompt: empty"}}'
        head = f"HTTP/1.1 400 X\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()
        writer.close()

    calls = []

    async def whole():
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with Client([Endpoint(f"http://127.0.0.1:{port}")], QUICK) as client:
            with pytest.raises(UserError, match="status 400: prompt: empty"):
                await client.post("/v1/completions", {})
        server.close()

    asyncio.run(whole())
    assert len(calls) == 1


def test_what_is_missing_is_a_sentence(monkeypatch):
    async def make(**options):
        Client([Endpoint("http://a", **options)])

    with pytest.raises(UserError, match="key_env K2_NO_SUCH_KEY of http://a: not set"):
        asyncio.run(make(key_env="K2_NO_SUCH_KEY"))
    monkeypatch.setattr(client_module, "aiohttp", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-k2\[remote\]'"):
        asyncio.run(make())
