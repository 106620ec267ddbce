"""What a request is known by, one answer for each, schemas held here, tokens and their cost."""

import asyncio

import pytest

from megatron_k2.engine.protocol import EngineError
from megatron_k2.errors import UserError
from megatron_k2.synthesis.llm.ledger import Prices, summed
from megatron_k2.synthesis.llm.model import Model, StoppingError, request_key
from megatron_k2.synthesis.llm.schema import SchemaError, read_answer
from megatron_k2.synthesis.store import Store, Used

SCHEMA = {
    "type": "object",
    "properties": {"rewrite": {"type": "string"}},
    "required": ["rewrite"],
    "additionalProperties": False,
}
MESSAGE = {"role": "user", "content": "say it"}


class Client:
    """Answers with the given texts in turn; the last again and again."""

    def __init__(self, *texts, reason="stop"):
        self.texts, self.reason, self.bodies = list(texts), reason, []

    async def post(self, path, body):
        self.bodies.append(body)
        await asyncio.sleep(0.01)
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        choice = {"message": {"content": text}, "finish_reason": self.reason}
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        return {"id": str(len(self.bodies)), "choices": [choice], "usage": usage}

    async def close(self):
        pass


@pytest.fixture
def store(tmp_path):
    found = Store(tmp_path / "work.sqlite")
    yield found
    found.close()


def test_a_request_is_asked_once_and_known_by_all_of_it(store):
    client = Client("one", "two", "three", "four")
    model = Model(client, "m", store, {"temperature": 0.5})

    async def ask(**more):
        return (await model.say([MESSAGE], **{"max_tokens": 9, "seed": 1, **more})).text

    async def all_of_them():
        first = await asyncio.gather(ask(), ask())
        return [*first, await ask(), await ask(sample=1), await ask(seed=2), await ask(seed=1)]

    assert asyncio.run(all_of_them()) == ["one", "one", "one", "two", "three", "one"]
    assert len(client.bodies) == 3
    again = Model(Client("another"), "m", store, {"temperature": 0.5})
    assert asyncio.run(again.say([MESSAGE], max_tokens=9, seed=1)).text == "one"
    warmer = Model(Client("another"), "m", store, {"temperature": 0.6})
    assert asyncio.run(warmer.say([MESSAGE], max_tokens=9, seed=1)).text == "another"


def test_the_sample_is_part_of_the_key_even_where_the_body_is_the_same():
    assert request_key("/a", {"x": 1, "y": 2}, 0) == request_key("/a", {"y": 2, "x": 1}, 0)
    assert request_key("/a", {"x": 1}, 0) != request_key("/a", {"x": 1}, 1)
    assert request_key("/a", {"x": 1}, 0) != request_key("/b", {"x": 1}, 0)


def test_nothing_new_is_asked_while_it_stops_and_what_is_known_is_given(store):
    model = Model(Client("one"), "m", store)
    asyncio.run(model.say([MESSAGE], max_tokens=9, seed=1))
    model.is_stopping = True
    assert asyncio.run(model.say([MESSAGE], max_tokens=9, seed=1)).text == "one"
    with pytest.raises(StoppingError):
        asyncio.run(model.say([MESSAGE], max_tokens=9, seed=2))


def test_one_repair_turn_and_no_second(store):
    client = Client("Sure!", '{"rewrite": "x"}')
    model = Model(client, "m", store)
    ask = {"max_tokens": 9, "seed": 0}
    assert asyncio.run(model.value([MESSAGE], SCHEMA, **ask)) == {"rewrite": "x"}
    assert '"Sure!"' in client.bodies[1]["messages"][1]["content"]
    client = Client("Sure! <|im_end|>", "Still no.")
    with pytest.raises(SchemaError, match="not JSON"):
        asyncio.run(Model(client, "n", store).value([MESSAGE], SCHEMA, **ask))
    assert len(client.bodies) == 2
    assert "<|im_end|>" not in client.bodies[1]["messages"][1]["content"]
    cut = Model(Client('{"rewrite": "x"}', reason="length"), "o", store)
    with pytest.raises(SchemaError, match="cut"):
        asyncio.run(cut.value([MESSAGE], SCHEMA, **ask))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("[1]", "is not of type 'object'"),
        ('{"rewrite": 3}', "rewrite: 3 is not of type"),
        ('{"rewrite": "x", "more": 1}', "Additional properties"),
        ('{"rewrite": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_an_answer_that_is_not_of_the_schema_says_where(text, said):
    with pytest.raises(SchemaError, match=said):
        read_answer(text, SCHEMA)


def test_a_fence_around_the_answer_is_read():
    assert read_answer('Here:\n```json\n{"rewrite": "x"}\n```', SCHEMA) == {"rewrite": "x"}


@pytest.mark.parametrize("answer", [{}, [], {"choices": {}}, {"choices": []}, {"choices": [{}]}])
def test_an_answer_that_is_not_openais_is_an_engines_error(store, answer):
    class Odd(Client):
        async def post(self, path, body):
            return answer

    with pytest.raises(EngineError, match="not OpenAI's"):
        asyncio.run(Model(Odd("x"), "m", store).say([MESSAGE], max_tokens=9, seed=0))


def test_tokens_are_counted_once_for_each_request(store):
    model = Model(Client("one"), "m", store)
    for seed in (0, 1, 1, 0):
        asyncio.run(model.say([MESSAGE], max_tokens=9, seed=seed))
    assert store.used() == {"m": Used(2, 6, 4)}
    total = summed([store.used(), {"m": Used(1, 10, 0), "n": Used(1, 1, 1)}])
    assert total == {"m": Used(3, 16, 4), "n": Used(1, 1, 1)}
    assert Prices(2.0, 8.0).cost(500_000, 250_000) == pytest.approx(3.0)
    with pytest.raises(UserError):
        Prices(-1.0)
