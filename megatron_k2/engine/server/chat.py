"""``/v1/chat/completions``: K2's chat format with tools in, content and tool calls out.

A client's text is encoded as letters, whatever control tokens it names. The model's answer is read
by the tolerant parser; its calls are handed on and never executed.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_k2.chat.call_ids import guessed_name
from megatron_k2.chat.completion import Completion, CompletionParser, CompletionStream, Event
from megatron_k2.chat.control import IM_END
from megatron_k2.chat.lexer import IdLexer
from megatron_k2.engine.protocol import SamplingParams, Token
from megatron_k2.engine.server.bodies import ChatBody
from megatron_k2.engine.server.completions import usage
from megatron_k2.engine.server.enforced import grammar_of
from megatron_k2.engine.server.routes import encoded_routes
from megatron_k2.engine.server.service import (
    Piece,
    Service,
    Whole,
    gathered,
    merged,
    params_of_choices,
)
from megatron_k2.engine.text import StopStrings
from megatron_k2.errors import UserError
from megatron_k2.records.messages import ToolSpec

type Delta = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A chat body, settled."""

    prompt: tuple[int, ...]
    tools: tuple[ToolSpec, ...]
    params: SamplingParams
    stops: tuple[str, ...]
    num_choices: int
    grammar: str | None


async def settled(service: Service, body: ChatBody) -> Asked:
    """``asked``, beside the event loop where a schema is compiled."""
    is_forced = body.tool_choice not in (None, "auto", "none")
    if is_forced or body.response_format is not None or body.tools:
        return await asyncio.to_thread(asked, service, body)
    return asked(service, body)


def asked(service: Service, body: ChatBody) -> Asked:
    """Render the dialogue and settle the parameters.

    Raises:
        UserError: something is wrong, or asked for and not computed here.
    """
    messages, tools = service.dialogue(body.messages, body.tools)
    if body.tool_choice == "none":
        tools = ()
    rendered = service.renderer.render(messages, tools, add_generation_prompt=True)
    room = service.room_for(rendered.ids)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs and not body.logprobs:
        raise UserError("top_logprobs without logprobs: set logprobs to true")
    num_top = (body.top_logprobs or 0) if body.logprobs else 0
    params = body.params(room if wanted is None else wanted, service.end_ids, num_top)
    if not params.max_tokens:
        raise UserError("max_tokens 0: nothing is asked for")
    stops, grammar = tuple(body.stops), grammar_of(service, body, messages, tools)
    if grammar is not None:
        service.engine.check_grammar(grammar)
        end = service.renderer.control.by_name[IM_END]
        params = replace(params, stop_token_ids=(*params.stop_token_ids, end))
    return Asked(tuple(rendered.ids), tools, params, stops, body.n or 1, grammar)


class Reader:
    """One answer's tokens to content and calls, as they come.

    Args:
        service: its tokenizer is that of the ids.
        tools: those declared.
        stops: strings that end the answer where its content holds one.
    """

    def __init__(self, service: Service, tools: Sequence[ToolSpec], stops: Sequence[str]) -> None:
        self._tools, self._stop = tools, StopStrings(stops)
        parser = CompletionParser("tolerant", tools)
        self._stream = CompletionStream(IdLexer(service.tokenizer), parser)
        self.num_calls = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop string that came."""
        return self._stop.found

    def feed(self, ids: Sequence[int]) -> list[Delta]:
        """OpenAI's deltas of new tokens."""
        return [d for event in self._stream.feed(ids) if (d := self._delta(event))]

    def close(self) -> tuple[list[Delta], Completion]:
        """The last deltas, and the whole answer."""
        events, completion = self._stream.close()
        deltas = [d for event in events if (d := self._delta(event))]
        if rest := self._stop.close():
            deltas.append({"content": rest})
        return deltas, completion

    def _delta(self, event: Event) -> Delta | None:
        match event.kind:
            case "content":
                text = self._stop.feed(event.text)
                return {"content": text} if text else None
            case "call":
                self.num_calls = event.call + 1
                function = {"name": guessed_name(event.text, self._tools)[0], "arguments": ""}
                return _call(event, {"id": event.text, "type": "function", "function": function})
            case "arguments":
                return _call(event, {"function": {"arguments": event.text}})
        return None


def _call(event: Event, fields: dict[str, Any]) -> Delta:
    return {"tool_calls": [{"index": event.call, **fields}]}


@dataclass
class Answer:
    """What a reader made of one answer."""

    whole: Whole = field(default_factory=Whole)
    content: str = ""
    completion: Completion | None = None
    reason: str = "stop"

    def message(self) -> dict[str, Any]:
        """OpenAI's message."""
        assert self.completion is not None  # set by the time it ends
        calls = [call.to_object() for call in self.completion.tool_calls]
        found: dict[str, Any] = {"role": "assistant", "content": self.content or None}
        return found | ({"tool_calls": calls} if calls else {"content": self.content})


async def answered(
    service: Service, one: Asked, name: str
) -> AsyncGenerator[tuple[Delta, Piece], None]:
    """Deltas of one choice; the last has ``finish_reason`` in its piece."""
    reader = Reader(service, one.tools, one.stops)
    pieces = service.answer(name, one.prompt, one.params, grammar=one.grammar)
    end = service.tokenizer.special_ids.get(IM_END)
    try:
        async for piece in pieces:
            ids = [token.id for token in piece.tokens]
            if piece.reason == "stop" and ids and ids[-1] == piece.stop != end:
                ids = ids[:-1]  # another token that ends answers: no part of the turn
            deltas = reader.feed(ids)
            is_over = piece.reason is not None or reader.stopped_by is not None
            if is_over:
                more, completion = reader.close()
                deltas += more
                piece.reason = piece.reason or "stop"
                if reader.stopped_by is not None:
                    piece.reason, piece.stop = "stop", reader.stopped_by
                deltas.append({"completion": completion})
            for delta in deltas[:-1]:
                yield delta, Piece()
            yield (deltas[-1] if deltas else {}), piece
            if is_over:
                return
    finally:
        await pieces.aclose()


def _reason(piece: Piece, completion: Completion) -> str:
    has_calls = bool(completion.tool_calls)
    return "tool_calls" if has_calls and piece.reason == "stop" else str(piece.reason)


async def _answer(service: Service, one: Asked, name: str) -> Answer:
    found = Answer()
    async for delta, piece in answered(service, one, name):
        found.whole.add(piece)
        found.content += delta.get("content", "")
        if (completion := delta.get("completion")) is not None:
            found.completion, found.reason = completion, _reason(piece, completion)
    return found


def _choices(one: Asked) -> list[Asked]:
    return [replace(one, params=p) for p in params_of_choices(one.params, one.num_choices)]


async def complete(service: Service, body: ChatBody, name: str) -> dict[str, Any]:
    """The whole answer."""
    one = await settled(service, body)
    answers: list[Answer] = await gathered(
        [_answer(service, each, f"{name}-{i}") for i, each in enumerate(_choices(one))]
    )
    found = service.envelope(name, "chat.completion") | {
        "choices": [_choice(service, body, i, answer) for i, answer in enumerate(answers)],
        "usage": usage([len(one.prompt)], [answer.whole for answer in answers]),
    }
    return found | ({"prompt_token_ids": list(one.prompt)} if body.return_token_ids else {})


def _choice(service: Service, body: ChatBody, place: int, answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {
        "index": place,
        "message": answer.message(),
        "logprobs": logprobs(service, answer.whole.tokens) if body.logprobs else None,
        "finish_reason": answer.reason,
        "stop_reason": answer.whole.stop,
    }
    tokens = answer.whole.tokens
    if body.return_token_ids:
        found["token_ids"] = [token.id for token in tokens]
        found["weight_versions"] = [token.weight_version for token in tokens]
    if body.return_routed_experts:
        found["routed_experts"] = encoded_routes([*answer.whole.prompt_tokens, *tokens])
    return found


def logprobs(service: Service, tokens: Sequence[Token]) -> dict[str, Any]:
    """OpenAI's form of a chat's."""
    return {
        "content": [
            _scored(service, token.id, token.logprob)
            | {"top_logprobs": [_scored(service, c.id, c.logprob) for c in token.top]}
            for token in tokens
        ]
    }


def _scored(service: Service, token: int, logprob: float | None) -> dict[str, Any]:
    text = service.tokenizer.decode([token])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


async def stream(service: Service, body: ChatBody, name: str) -> AsyncGenerator[Any, None]:
    """The answer in pieces; the last, where asked for, is the usage."""
    if body.prompt_logprobs is not None or body.return_routed_experts:
        raise UserError("stream: not together with prompt_logprobs or routed experts")
    one = await settled(service, body)
    kind, answers = "chat.completion.chunk", [Whole() for _ in range(one.num_choices)]

    for number in range(one.num_choices):
        first = {"index": number, "delta": {"role": "assistant", "content": ""}}
        yield service.envelope(name, kind) | {"choices": [first | {"finish_reason": None}]}
    streams = [answered(service, each, f"{name}-{i}") for i, each in enumerate(_choices(one))]
    async for number, (delta, piece) in merged(streams):
        answers[number].tokens += piece.tokens
        completion = delta.pop("completion", None)
        choice: dict[str, Any] = {
            "index": number,
            "delta": delta,
            "logprobs": logprobs(service, piece.tokens) if body.logprobs else None,
            "finish_reason": _reason(piece, completion) if completion is not None else None,
        }
        if body.return_token_ids:
            choice["token_ids"] = [token.id for token in piece.tokens]
        if delta or piece.tokens or completion is not None:
            yield service.envelope(name, kind) | {"choices": [choice]}
    if body.includes_usage:
        counts = usage([len(one.prompt)], answers)
        yield service.envelope(name, kind) | {"choices": [], "usage": counts}
