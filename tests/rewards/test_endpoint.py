"""The command against a server: a critic behind OpenAI's route, with and without probabilities."""

import asyncio
import json
import math
import threading
from contextlib import contextmanager

import pytest
from aiohttp import web

from megatron_k2.cli.main import main
from megatron_k2.rewards.pairs import made_pairs, to_line


def _letter(body, reads):
    """What a server that compares the quoted answers' last numbers would say."""
    text = body["messages"][-1]["content"]
    quoted = [json.loads(text.split(f"Answer {x}:\n")[1].split("\n\n")[0]) for x in "AB"]
    return reads(quoted)


@contextmanager
def serving(reads, *, has_logprobs=True):
    """A server of one model; ``reads`` says P(A) of two answers, ``None`` for babble."""
    ready, over, found = threading.Event(), asyncio.Event(), {}

    async def models(_request):
        return web.json_response({"data": [{"id": "critic"}]})

    async def chat(request):
        body = await request.json()
        p = _letter(body, reads)
        text = "Hm." if p is None else "A" if p > 0.5 else "B"
        choice = {"message": {"content": text}}
        if has_logprobs and p is not None:
            scored = {"A": math.log(p), "B": math.log(1 - p)}
            top = [{"token": t, "logprob": v} for t, v in scored.items()]
            content = [{"token": text, "logprob": scored[text], "top_logprobs": top}]
            choice["logprobs"] = {"content": content}
        return web.json_response({"choices": [choice], "usage": {"total_tokens": 100}})

    async def run():
        app = web.Application()
        app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found["port"] = runner.addresses[0][1]
        found["loop"] = asyncio.get_running_loop()
        ready.set()
        await over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{found['port']}"
    finally:
        found["loop"].call_soon_threadsafe(over.set)
        thread.join()


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(map(to_line, made_pairs(5, 20))))
    return str(path)


def test_a_critic_that_always_says_a_is_named(pairs, capsys):
    with serving(lambda _: 0.9) as url:
        assert main(["critic", "calibrate", "--endpoint", url, "--pairs", pairs]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "critic: below its bar" in out
    assert "by itself it goes by the order: 100.0%" in out


def test_letters_alone_will_do_and_babble_is_unreadable(pairs, capsys):
    with serving(lambda q: 0.9 if q[0] < q[1] else 0.1, has_logprobs=False) as url:
        assert main(["critic", "calibrate", "--endpoint", url, "--pairs", pairs]) == 1
    assert "unreadable" in capsys.readouterr().out
    with serving(lambda _: None) as url:
        assert main(["critic", "calibrate", "--endpoint", url, "--pairs", pairs]) == 1
    assert "cannot be read: 100.0%" in " ".join(capsys.readouterr().out.split())


def test_a_server_that_is_not_there_is_a_sentence(pairs, capsys):
    words = ["critic", "calibrate", "--endpoint", "http://127.0.0.1:9", "--pairs", pairs]
    assert main(words) == 2
    assert "--endpoint http://127.0.0.1:9" in capsys.readouterr().err
