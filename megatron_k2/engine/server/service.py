"""What the routes share: engine, tokenizer, chat format, limits, an answer's text and tokens."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_k2.chat.control import IM_END
from megatron_k2.chat.template import Renderer
from megatron_k2.data.tokenizer import Tokenizer
from megatron_k2.engine.protocol import Engine, FinishReason, Request, SamplingParams, Token
from megatron_k2.engine.text import StopStrings, TextPieces
from megatron_k2.errors import UserError
from megatron_k2.records.messages import Message, ToolSpec
from megatron_k2.records.read import message_from, tools_from


class BusyError(Exception):
    """More requests than may be in flight."""


@dataclass(frozen=True)
class ServerLimits:
    """What a server accepts."""

    body_bytes: int = 8 << 20
    requests: int = 2048
    """In flight, choices of one body counted apart."""
    seconds: float = 600.0
    """Of one body, from its arrival."""


@dataclass
class Piece:
    """New text and tokens of one answer."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt_tokens: tuple[Token, ...] = ()
    reason: FinishReason | None = None
    stop: str | int | None = None


@dataclass
class Whole:
    """One finished answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt_tokens: list[Token] = field(default_factory=list)
    reason: FinishReason | None = None
    stop: str | int | None = None

    def add(self, piece: Piece) -> None:
        """Append what came."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.prompt_tokens += piece.prompt_tokens
        self.reason, self.stop = piece.reason, piece.stop


class Service:
    """An engine with a tokenizer, as the routes see them.

    Args:
        engine: whichever.
        tokenizer: of its model.
        name: what clients call the model.
        limits: of requests.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        limits: ServerLimits | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.limits = limits or ServerLimits()
        self.num_running = 0
        self._renderer: Renderer | None = None

    @property
    def renderer(self) -> Renderer:
        """K2's chat format.

        Raises:
            UserError: the tokenizer has no control tokens.
        """
        self._renderer = self._renderer or Renderer(self.tokenizer)
        return self._renderer

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end any answer."""
        end = self.tokenizer.special_ids.get(IM_END)
        return tuple(dict.fromkeys(i for i in (self.tokenizer.eod_id, end) if i is not None))

    def require_model(self, asked: str | None) -> None:
        """Refuse another model's name; none at all is fine."""
        if asked is not None and asked != self.name:
            raise UserError(f"model {asked!r} is not served here; '{self.name}' is")

    def envelope(self, name: str, kind: str) -> dict[str, Any]:
        """What stands around every answer of OpenAI's routes."""
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.name}

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of plain text; control tokens' names stay letters."""
        return tuple(self.tokenizer.encode(text))

    def dialogue(
        self, messages: Sequence[dict[str, Any]], tools: Any
    ) -> tuple[tuple[Message, ...], tuple[ToolSpec, ...]]:
        """Records of OpenAI's objects.

        Raises:
            UserError: a message or a tool is wrong; says which and why.
        """
        found = []
        for place, message in enumerate(messages):
            try:
                found.append(message_from(message))
            except ValueError as error:
                raise UserError(f"messages[{place}]: {error}") from None
        try:
            return tuple(found), tools_from(tools)
        except ValueError as error:
            raise UserError(f"tools: {error}") from None

    def room_for(self, prompt: Sequence[int]) -> int:
        """Tokens that may follow a prompt.

        Raises:
            UserError: none.
        """
        room = self.engine.limits.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"{len(prompt)} tokens of prompt leave no room: this engine holds "
                f"{self.engine.limits.max_length} of prompt and answer"
            )
        return room

    async def answer(
        self,
        name: str,
        prompt: Sequence[int],
        params: SamplingParams,
        stops: Sequence[str] = (),
        grammar: str | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """One answer as it grows; leaving early ends it in the engine.

        Text leaves out the tokens in ``params.stop_token_ids`` and what a stop string cut.

        Raises:
            BusyError: too many are in flight.
            UserError: the grammar became too large on the way.
        """
        if self.num_running >= self.limits.requests:
            raise BusyError(f"{self.num_running} requests are in flight, as many as are allowed")
        self.num_running += 1
        text, stop = TextPieces(self.tokenizer), StopStrings(stops)
        try:
            outputs = self.engine.generate(Request(name, tuple(prompt), params, grammar))
            async with aclosing(outputs):
                async for output in outputs:
                    if output.fault:
                        raise UserError(f"the schema was given up: {output.fault[:300]}")
                    shown = [t.id for t in output.tokens]
                    if output.stop_id is not None:
                        shown = shown[:-1]
                    new = stop.feed(text.feed(shown))
                    piece = Piece(new, output.tokens, output.prompt_tokens, output.finish_reason)
                    piece.stop = output.stop_id
                    if stop.found is not None:
                        piece.reason, piece.stop = "stop", stop.found
                    elif piece.reason:
                        piece.text += stop.feed(text.close()) + stop.close()
                    yield piece
                    if piece.reason:
                        return
        finally:
            self.num_running -= 1

    async def whole(
        self, name: str, prompt: Sequence[int], params: SamplingParams, stops: Sequence[str] = ()
    ) -> Whole:
        """One answer at once."""
        found = Whole()
        async with aclosing(self.answer(name, prompt, params, stops)) as pieces:
            async for piece in pieces:
                found.add(piece)
        return found


def params_of_choices(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The parameters of each choice of one body: choice i draws with ``seed`` + i."""
    seed = params.seed or 0
    return [replace(params, seed=(seed + number) % (1 << 63)) for number in range(count)]


async def gathered[Result](tasks: Sequence[Any]) -> list[Result]:
    """All results; where one fails the others are cancelled and awaited."""
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(task) for task in tasks]
    return [task.result() for task in running]


async def merged[Item](
    streams: Sequence[AsyncGenerator[Item, None]],
) -> AsyncGenerator[tuple[int, Item], None]:
    """Pieces of several answers as they come, each with its stream's number."""
    queue: asyncio.Queue[tuple[int, Item | Exception | None]] = asyncio.Queue()

    async def drain(number: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    queue.put_nowait((number, piece))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(drain(i, stream)) for i, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            number, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                num_open -= 1
            else:
                yield number, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
