"""Questions by letter and for lists, against every way in which an endpoint answers."""

import asyncio

import pytest

from megatron_k2.engine.protocol import EngineError
from megatron_k2.rewards.asker import EndpointAsker
from megatron_k2.rewards.letters import letter_said, letter_shares


class Client:
    def __init__(self, choice):
        self.choice, self.bodies = choice, []

    async def post(self, path, body):
        assert path == "/v1/chat/completions"
        self.bodies.append(body)
        return self.choice if "choices" in self.choice else {"choices": [self.choice]}

    async def close(self):
        pass


def letter(choice):
    return asyncio.run(EndpointAsker(Client(choice), "m").letter("s", "u", ("A", "B", "C")))


def items(text):
    choice = {"message": {"content": text}}
    return asyncio.run(EndpointAsker(Client(choice), "m").items("s", "u"))


def test_by_log_probabilities():
    top = [{"token": " A", "logprob": -0.5}, {"token": "**B", "logprob": -0.5}]
    choice = {
        "message": {"content": "A"},
        "logprobs": {"content": [{"token": "A", "logprob": -0.5, "top_logprobs": top}]},
    }
    assert letter(choice) == pytest.approx({"A": 0.5, "B": 0.5, "C": 0.0})


def test_by_text_where_there_are_none():
    assert letter({"message": {"content": "It is (b)."}}) == {"B": 1.0}
    assert letter({"message": {"content": None}}) is None
    assert letter({"message": {"content": "Both, really"}}) is None


def test_lists():
    assert items('{"items": ["x", "y"]}') == ["x", "y"]
    assert items('["x"]') == ["x"]
    for broken in ("no json", '{"items": "x"}', "[1]", "3", ""):
        assert items(broken) is None


def test_what_is_no_answer():
    with pytest.raises(EngineError, match="not OpenAI's"):
        letter({"choices": []})


@pytest.mark.parametrize("broken", [None, {}, {"content": 3}, {"content": [{"token": "A"}]}, "x"])
def test_broken_log_probabilities_are_none(broken):
    assert letter_shares(broken, ("A", "B")) is None


def test_the_last_letter_that_stands_alone():
    assert letter_said("A or B? B", ("A", "B")) == "B"
    assert letter_said("Banana", ("A", "B")) is None
