"""Clients as others wrote them: lm-eval's, and the request forms of Moonshot's vendor verifier.

lm-eval is read where it is installed. The verifier (MoonshotAI/K2-Vendor-Verifier) is a script with
an account in mind: here stands what it sends and how it puts a stream together, in our words.
"""

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the openai package")

from megatron_k2.engine.protocol import Request, SamplingParams  # noqa: E402
from tests.engine.server.served import random_engine, served, tokenizer_in  # noqa: E402
from tests.engine.server.test_server import CALL, WEATHER, says  # noqa: E402

TWO_CALLS = CALL.replace(
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
)
EARLIER = {
    "id": "search:0",
    "type": "function",
    "function": {"name": "search", "arguments": '{"query": "x"}'},
}
DIALOGUES = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}],
    [
        {"role": "system", "content": "You are Kimi."},
        {"role": "system", "content": "It was an _input: the verifier sends it as system."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [EARLIER]},
        {"role": "tool", "tool_call_id": "search:0", "name": "search", "content": "nothing"},
        {"role": "user", "content": "Again."},
    ],
]
LOOSE = {"type": "function", "function": {"name": "search", "parameters": {"query": "company X"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


async def put_together(stream):
    """A stream's calls by their index, its content and its end."""
    calls, content, reason = {}, "", None
    async for event in stream:
        if not event.choices:
            continue
        choice = event.choices[0]
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            held = calls.setdefault(part.index, {"id": part.id, "name": "", "arguments": ""})
            held["name"] = part.function.name or held["name"]
            held["arguments"] += part.function.arguments or ""
        reason = choice.finish_reason or reason
    return list(calls.values()), content, reason


def test_the_vendor_verifiers_requests(tokenizer):
    async def body(url):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked = [
            {"model": "tiny", "messages": messages, "tools": [WEATHER, LOOSE],
             "temperature": 0.6, "max_tokens": 400, "extra_body": {}}
            for messages in DIALOGUES * 3
        ]  # fmt: skip
        create = client.chat.completions.create
        streams = await asyncio.gather(*(create(**each, stream=True) for each in asked))
        read = await asyncio.gather(*(put_together(stream) for stream in streams))
        whole = await asyncio.gather(*(create(**each) for each in asked))
        return read, [answer.model_dump()["choices"][0] for answer in whole]

    with served(says(tokenizer, TWO_CALLS), tokenizer) as (url, _):
        streamed, whole = asyncio.run(body(url))
    for (calls, content, reason), choice in zip(streamed, whole, strict=True):
        assert reason == choice["finish_reason"] == "tool_calls"
        assert content == choice["message"]["content"] == "Let me see."
        assert [c["id"] for c in calls] == ["functions.get_weather:0", "functions.get_weather:1"]
        assert [json.loads(c["arguments"]) for c in calls] == [{"city": "Paris"}, {}]
        told = [(c["id"], c["function"]["name"]) for c in choice["message"]["tool_calls"]]
        assert told == [(c["id"], c["name"]) for c in calls]


def test_lm_eval_scores_and_generates(tokenizer, tmp_path):
    """Its log-likelihoods are the engine's own, from prompts in ids."""
    pytest.importorskip("aiohttp", reason="needs lm-eval with its extra api")
    completions = pytest.importorskip(
        "lm_eval.models.openai_completions", reason="needs lm-eval with its extra api"
    )
    from lm_eval.api.instance import Instance

    tokenizer.save(tmp_path)
    pairs = [("The sum of 1", " and 2 is 3."), ("get_weather", " {city: Paris}"), ("The", " sum")]

    async def expected(engine, first, second):
        """The pair's log-probability, and whether each token of the second was the best."""
        ids = tuple(tokenizer.encode(first + second))
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        outputs = engine.generate(Request(first, ids, params))
        (told,) = [output.prompt_tokens async for output in outputs]
        scored = told[len(tokenizer.encode(first)) :]
        return sum(t.logprob for t in scored), all(t.top[0].id == t.id for t in scored)

    async def all_expected():
        engine = random_engine(tokenizer)
        found = [await expected(engine, *pair) for pair in pairs]
        await engine.close()
        return found

    with served(lambda: random_engine(tokenizer), tokenizer) as (url, _):
        client = completions.LocalCompletionsAPI(
            model="tiny", base_url=f"{url}/v1/completions", tokenizer=str(tmp_path),
            tokenizer_backend="huggingface", tokenized_requests=True, batch_size=2,
            max_length=512, max_retries=1,
        )  # fmt: skip
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        scores = client.loglikelihood(asked)
        until = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.0}
        texts = client.generate_until([Instance("generate_until", {}, ("The sum", until), 0)])
    for (score, is_best), (wanted, is_greedy) in zip(
        scores, asyncio.run(all_expected()), strict=True
    ):
        assert score == pytest.approx(wanted, abs=1e-4)
        assert is_best == is_greedy
    assert len(texts) == 1
    assert "\n" not in texts[0]
