"""``Model``: a model behind an endpoint, of which every request is asked once.

An answer is known by the whole request: path, body (model, messages, sampling, seed) and the number
of the sample. It goes into the shard's store before whoever asked sees it. Where the endpoint is
does not count: endpoints serve the same model by the same name.
"""

import asyncio
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_k2.chat.quoting import quoted
from megatron_k2.engine.protocol import EngineError
from megatron_k2.synthesis.llm.schema import SchemaError, read_answer, response_format
from megatron_k2.synthesis.store import Store

if TYPE_CHECKING:
    from megatron_k2.engine.remote.client import Client

CHAT = "/v1/chat/completions"
_REPAIR = (
    "An answer to the request above was this, quoted as a JSON string: {answer}\n\nIt does not fit "
    "the schema ({problem}). Answer the request again, with JSON of the schema and nothing else."
)


class StoppingError(Exception):
    """The work is being stopped, so nothing new is asked."""


class Said(NamedTuple):
    """An answer in text."""

    text: str
    is_cut: bool
    """Whether it ended because there was no more room."""


class Model:
    """Asks, and keeps what is answered.

    Args:
        client: of its endpoints, which ``close`` closes.
        name: as they call it.
        store: where answers are kept.
        sampling: fields of every chat request, as ``temperature``; part of it like all else.
    """

    def __init__(
        self,
        client: "Client",
        name: str,
        store: Store,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self._client, self._store = name, client, store
        self._sampling = dict(sampling or {})
        self._under_way: dict[bytes, asyncio.Future[Any]] = {}
        self.num_asked = self.num_known = 0
        self.is_stopping = False

    async def post(self, path: str, body: Any, *, sample: int = 0) -> Any:
        """One answer, from the store where it is there; its choices and usage alone.

        Args:
            path: of the route.
            body: JSON.
            sample: which of several answers to the same body this is.

        Raises:
            StoppingError: it would have to be asked, and ``is_stopping``.
            RefusedError: the endpoint refused the request itself.
            EngineError: no attempt was answered.
        """
        key = request_key(path, body, sample)
        if (known := self._store.answer(key)) is not None:
            self.num_known += 1
            return known
        if (under_way := self._under_way.get(key)) is not None:
            return await asyncio.shield(under_way)
        if self.is_stopping:
            raise StoppingError
        self._under_way[key] = future = asyncio.get_running_loop().create_future()
        try:
            answer = _kept_part(await self._client.post(path, body))
            self._store.keep_answer(key, answer, self.name, _usage(answer))
        except asyncio.CancelledError:
            future.cancel()
            raise
        except Exception as error:
            future.set_exception(error)
            future.exception()  # whoever waits has it; without one it must not be reported
            raise
        finally:
            del self._under_way[key]
        self.num_asked += 1
        future.set_result(answer)
        return answer

    async def say(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        seed: int,
        sample: int = 0,
        form: Mapping[str, Any] | None = None,
    ) -> Said:
        """The text of an answer to messages.

        Raises:
            Exception: what ``post`` raises; ``EngineError`` too where the answer is not OpenAI's.
        """
        body = {
            "model": self.name,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "seed": seed + sample,
            **self._sampling,
        }
        if form is not None:
            body["response_format"] = dict(form)
        answer = await self.post(CHAT, body, sample=sample)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            return Said(str(text), choice.get("finish_reason") == "length")
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(f"the model's answer is not OpenAI's: {error!r}") from None

    async def value(
        self,
        messages: Sequence[Mapping[str, str]],
        schema: Mapping[str, Any],
        *,
        max_tokens: int,
        seed: int,
        sample: int = 0,
    ) -> Any:
        """An answer that is JSON of a schema; where it is not, one repair turn.

        Raises:
            SchemaError: not even then.
            Exception: what ``post`` raises.
        """
        form = response_format("answer", schema)
        ask = functools.partial(
            self.say, max_tokens=max_tokens, seed=seed, sample=sample, form=form
        )
        said = await ask(messages)
        try:
            return _read(said, schema)
        except SchemaError as problem:
            repair = _REPAIR.format(answer=quoted(said.text), problem=problem)
            again = [*messages, {"role": "user", "content": repair}]
        return _read(await ask(again), schema)

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()


def _read(said: Said, schema: Mapping[str, Any]) -> Any:
    if said.is_cut:
        raise SchemaError("the answer was cut at its largest length")
    return read_answer(said.text, schema)


def request_key(path: str, body: Any, sample: int) -> bytes:
    """What an answer is known by: sha256 of the whole request."""
    text = json.dumps([path, body, sample], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def _kept_part(answer: Any) -> Any:
    """Choices and usage: the rest (ids, times) differs from call to call and says nothing."""
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise EngineError("the model's answer is not OpenAI's: it has no choices")
    return {name: answer[name] for name in ("choices", "usage") if name in answer}


def _usage(answer: Mapping[str, Any]) -> tuple[int, int]:
    usage = answer.get("usage")
    found = usage if isinstance(usage, dict) else {}
    numbers = (found.get(name) for name in ("prompt_tokens", "completion_tokens"))
    prompt, completion = (each if isinstance(each, int) else 0 for each in numbers)
    return prompt, completion
