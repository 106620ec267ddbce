"""Answers held to grammars in two processes: those of one process, to the bit.

Batch-invariant, so that nothing hangs on which process an answer went to. Wrong variant: the same
seeds without the grammar.
"""

import asyncio
import functools
import json
from dataclasses import replace

import pytest

pytest.importorskip("llguidance", reason="needs the extra grammar")

from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.engine.grammar import calls_grammar, values_grammar
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.opened import core_of
from megatron_k2.engine.local.pool import PoolEngine
from megatron_k2.engine.protocol import Request, SamplingParams
from megatron_k2.errors import UserError
from tests.engine.local.models import TINY, reference, saved
from tests.engine.server.served import served, tokenizer_in
from tests.engine.test_grammar import TOOLS, WEATHER, is_valid

pytestmark = pytest.mark.slow

SLOTS = {"num_slots": 4, "max_length": 1024, "is_batch_invariant": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    preset = replace(
        TINY, vocab_size=tokenizer_in(folder).vocab_size + 5, max_position_embeddings=4096
    )
    return saved(reference(preset), preset, folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pool(folder, loop):
    load = functools.partial(load_tokenizer, folder)
    found = PoolEngine.from_directory(folder, num_processes=2, tokenizer=load, **SLOTS)
    yield found
    loop.run(found.close())


@pytest.fixture(scope="module")
def requests(tokenizer):
    """Calls, values and free text side by side."""
    calls = calls_grammar(TOOLS[:3], tokenizer.special_ids, 0)
    grammars = [values_grammar(WEATHER), calls, None]
    ends = (tokenizer.special_ids["<|im_end|>"],)
    return [
        Request(
            str(seed),
            (5, 6, 7 + seed),
            SamplingParams(max_tokens=300, seed=seed, stop_token_ids=ends),
            grammars[seed % 3],
        )
        for seed in range(12)
    ]


async def answers(engine, requests):
    async def one(request):
        found = []
        async for output in engine.generate(request):
            assert not output.fault
            found += output.tokens
        return found

    return await asyncio.gather(*map(one, requests))


def test_answers_are_those_of_one_process_to_the_bit(pool, loop, folder, tokenizer, requests):
    async def alone():
        engine = LocalEngine(core_of(folder, tokenizer=lambda: tokenizer, **SLOTS))
        found = await answers(engine, requests)
        free = await answers(engine, [replace(request, grammar=None) for request in requests])
        await engine.close()
        return found, free

    expected, free = loop.run(alone())
    assert loop.run(answers(pool, requests)) == expected
    assert all(
        (a == b) == (r.grammar is None) for a, b, r in zip(expected, free, requests, strict=True)
    )
    for tokens in expected[::3]:
        ids = [token.id for token in tokens]
        assert is_valid(json.loads(tokenizer.decode(ids[:-1])), WEATHER)


def test_what_cannot_be_held_is_refused_by_the_pool_and_by_a_process(pool, loop):
    with pytest.raises(UserError, match="cannot be enforced"):
        pool.check_grammar('start: %json {"type": "objekt"}\n')
    with pytest.raises(UserError, match="cannot be enforced"):
        loop.run(answers(pool, [Request("wrong", (5,), grammar="start: nowhere\n")]))
    assert pool.health().is_ready


def test_a_server_of_two_processes_answers_by_a_schema(pool, tokenizer):
    """Last: the server ends the pool."""
    httpx = pytest.importorskip("httpx2", reason="needs httpx2, which openai brings")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER}}
    body = {"messages": [{"role": "user", "content": "?"}], "response_format": wanted, "n": 4}
    with served(lambda: pool, tokenizer) as (url, _):
        found = httpx.post(f"{url}/v1/chat/completions", json=body | {"seed": 1}, timeout=60).json()
    contents = [choice["message"]["content"] for choice in found["choices"]]
    assert len(set(contents)) > 1
    assert all(is_valid(json.loads(content), WEATHER) for content in contents)
