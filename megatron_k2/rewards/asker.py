"""``EndpointAsker``: short questions to a model behind ``/v1/chat/completions``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_k2.engine.protocol import EngineError
from megatron_k2.rewards.letters import letter_said, letter_shares

MOST_ITEM_TOKENS = 2048


class Poster(Protocol):
    """What answers a body: the HTTP client, or what keeps its answers."""

    async def post(self, path: str, body: Any) -> Any:
        """One answer."""
        ...

    async def close(self) -> None:
        """End its connections."""
        ...


class EndpointAsker:
    """Asks by letters and for lists (``fidelity/statements.py``).

    Args:
        client: of the model's endpoints, which ``close`` closes.
        model: as they call it.
    """

    def __init__(self, client: Poster, model: str) -> None:
        self.name = model
        self._client = client

    async def letter(
        self, system: str, user: str, letters: Sequence[str]
    ) -> Mapping[str, float] | None:
        """By the first token's log-probabilities where the endpoint gives them, else by its text.

        Raises:
            EngineError: it does not answer.
        """
        more = {"max_tokens": 4, "logprobs": True, "top_logprobs": 20}
        choice = await self._choice(system, user, more)
        if (shares := letter_shares(choice.get("logprobs"), letters)) is not None:
            return shares
        said = letter_said(_text(choice), letters)
        return None if said is None else {said: 1.0}

    async def items(self, system: str, user: str) -> list[str] | None:
        """A list of texts, from an object with ``items``; an array alone is taken too.

        Raises:
            EngineError: it does not answer.
        """
        more = {"max_tokens": MOST_ITEM_TOKENS, "response_format": {"type": "json_object"}}
        text = _text(await self._choice(system, user, more))
        try:
            found = json.loads(text)
        except ValueError:
            return None
        listed = found.get("items") if isinstance(found, dict) else found
        if isinstance(listed, list) and all(isinstance(each, str) for each in listed):
            return listed
        return None

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()

    async def _choice(self, system: str, user: str, more: Mapping[str, Any]) -> Mapping[str, Any]:
        roles = (("system", system), ("user", user))
        messages = [{"role": role, "content": content} for role, content in roles]
        body = {"model": self.name, "messages": messages, "temperature": 0, **more}
        answer = await self._client.post("/v1/chat/completions", body)
        try:
            choice: Mapping[str, Any] = answer["choices"][0]
            _text(choice)
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(f"the model's answer is not OpenAI's: {error!r}") from None
        return choice


def _text(choice: Mapping[str, Any]) -> str:
    return choice["message"]["content"] or ""
