"""Forced calls and schemas over the embedded engine with random weights, by the ``openai`` SDK."""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra grammar")
openai = pytest.importorskip("openai", reason="needs the openai package")
httpx = pytest.importorskip("httpx2", reason="needs httpx2, which openai brings")

from megatron_k2.chat.completion import parse_completion  # noqa: E402
from megatron_k2.chat.lexer import IdLexer  # noqa: E402
from megatron_k2.engine import constrained  # noqa: E402
from megatron_k2.engine.scripted import ScriptedEngine  # noqa: E402
from tests.engine.server.served import random_engine, served, tokenizer_in  # noqa: E402
from tests.engine.test_grammar import HOSTILE, NESTED, WEATHER, is_valid  # noqa: E402

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("get_weather", WEATHER), ("tell", NESTED))
]
SCHEMAS = {"get_weather": WEATHER, "tell": NESTED}
ASK = [{"role": "user", "content": "Weather?"}]
NAMED = {"type": "function", "function": {"name": "tell"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def url(tokenizer):
    with served(lambda: random_engine(tokenizer), tokenizer) as (found, _):
        yield found


@pytest.fixture(scope="module")
def ask(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def call(**fields):
        return client.chat.completions.create(model="tiny", messages=ASK, **fields)

    return call


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call_is_one_the_strict_parser_reads(ask, tokenizer, choice):
    found = ask(
        tools=TOOLS, tool_choice=choice, n=8, seed=1, temperature=2.0,
        logprobs=True, extra_body={"return_token_ids": True},
    )  # fmt: skip
    for one in found.choices:
        assert one.finish_reason == "tool_calls"
        whole = parse_completion(IdLexer(tokenizer), one.token_ids, degree="strict")
        assert len(whole.tool_calls) == len(one.message.tool_calls) >= 1
        for place, call in enumerate(one.message.tool_calls):
            name = call.function.name
            assert name in SCHEMAS if choice == "required" else name == "tell"
            assert call.id == f"functions.{name}:{place}"
            assert is_valid(json.loads(call.function.arguments), SCHEMAS[name])
        # The model's own, before the mask: a forced token is not certain.
        assert all(-20 < token.logprob < -2 for token in one.logprobs.content)


def test_a_stream_of_a_forced_call_is_the_whole(ask):
    fields = {"tools": TOOLS, "tool_choice": "required", "seed": 4, "parallel_tool_calls": False}
    whole = ask(**fields).choices[0].message.tool_calls
    pieces = [p.choices[0] for p in ask(**fields, stream=True)]
    calls = [c for p in pieces for c in p.delta.tool_calls or []]
    assert len(whole) == 1
    assert "".join(c.function.arguments or "" for c in calls) == whole[0].function.arguments
    assert pieces[-1].finish_reason == "tool_calls"


def test_calls_are_counted_on_from_those_of_the_dialogue(url):
    call = {"id": "functions.tell:0", "type": "function",
            "function": {"name": "tell", "arguments": "{}"}}  # fmt: skip
    dialogue = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.tell:0", "content": "no"},
    ]
    body = {"messages": dialogue, "tools": TOOLS, "tool_choice": "required", "seed": 2}
    found = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    ids = [c["id"] for c in found["choices"][0]["message"]["tool_calls"]]
    assert [int(i.rpartition(":")[2]) for i in ids] == list(range(1, len(ids) + 1))


def test_a_strict_tool_holds_calls_that_the_model_makes_itself(ask, tokenizer):
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    found = ask(tools=strict, n=16, seed=0, temperature=3.0, extra_body={"return_token_ids": True})
    called = [one for one in found.choices if one.message.tool_calls]
    assert 0 < len(called) < 16
    for one in found.choices:
        parse_completion(IdLexer(tokenizer), one.token_ids, degree="strict")


@pytest.mark.parametrize("schema", [WEATHER, NESTED | {"type": "object"}])
def test_an_answer_by_its_schema(ask, schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for one in ask(response_format=wanted, n=6, seed=0).choices:
        assert is_valid(json.loads(one.message.content), schema)


def test_any_object(ask):
    found = ask(response_format={"type": "json_object"}, n=3, seed=0, max_tokens=1500).choices
    whole = [one for one in found if one.finish_reason == "stop"]
    assert all(isinstance(json.loads(one.message.content), dict) for one in whole)
    assert all(one.message.content.startswith("{") for one in found)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_400(url, name):
    schema, said = HOSTILE[name]
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": ASK, "response_format": wanted}
    found = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert found.status_code == 400
    assert said in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": "required"}, "a call is wanted, but tools declares none"),
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}, "tools": TOOLS},
         "function 'no' is wanted"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": "must"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS, "tool_choice": "required"},
         "not together with"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_400(url, fields, said):
    found = httpx.post(f"{url}/v1/chat/completions", json={"messages": ASK} | fields)
    assert found.status_code == 400
    assert said in found.json()["error"]["message"]


def test_where_it_cannot_be_enforced_it_is_refused(tokenizer, monkeypatch):
    body = {"messages": ASK, "response_format": {"type": "json_object"}}
    with served(lambda: ScriptedEngine(400), tokenizer) as (own, _):
        route = f"{own}/v1/chat/completions"
        assert "held to no grammar" in httpx.post(route, json=body).text
    monkeypatch.setattr(constrained.importlib.util, "find_spec", lambda _: None)
    with served(lambda: random_engine(tokenizer), tokenizer) as (own, _):
        found = httpx.post(f"{own}/v1/chat/completions", json=body)
        assert (found.status_code, "megatron-k2[grammar]" in found.text) == (400, True)
