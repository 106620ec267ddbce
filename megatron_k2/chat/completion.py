"""What a model answered, read back: content and tool calls, from ids or text, whole or streaming.

    lexer (ids or text to pieces) -> CompletionParser (pieces to events) -> Completion

Three degrees. ``exact`` takes what ``template`` writes and nothing else, arguments being any text;
``strict`` also wants ids that pass Moonshot's expression and arguments that are a JSON object, and
is what a format check counts; ``tolerant`` never raises: it makes the best of what is there and
records each thing that was wrong as a ``Finding``.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from megatron_k2.chat import control
from megatron_k2.chat.call_ids import exact_name, guessed_name, strict_name
from megatron_k2.chat.lexer import VARIANTS, Lexer
from megatron_k2.chat.template import Piece
from megatron_k2.records.messages import Message, ToolCall, ToolSpec
from megatron_k2.records.read import no_constant

Degree = Literal["exact", "strict", "tolerant"]


class FormatError(ValueError):
    """The pieces are not what the template writes; the message says where it stopped fitting."""


class Finding(NamedTuple):
    """Something a tolerant parser passed over."""

    kind: str
    """A word that can be counted, such as ``truncated_arguments``."""
    detail: str


class Event(NamedTuple):
    """A step of a stream."""

    kind: Literal["content", "call", "arguments", "call_end", "end"]
    text: str = ""
    """New content; a call's id; new letters of arguments."""
    call: int = -1
    """Which call of this turn, from 0."""


@dataclass(frozen=True)
class Completion:
    """One answer."""

    content: str
    tool_calls: tuple[ToolCall, ...]
    is_finished: bool
    """Whether it ended its turn, rather than being cut off."""
    findings: tuple[Finding, ...] = ()

    def to_message(self) -> Message:
        """As a turn of the dialogue."""
        return Message("assistant", self.content, tool_calls=self.tool_calls)


class _At(StrEnum):
    """Where in the turn the parser is."""

    CONTENT = "content"
    SECTION = "the calls"
    ID = "a call's id"
    ARGUMENTS = "a call's arguments"
    AFTER = "what follows the calls"
    ENDED = "what follows the turn"


class CompletionParser:
    """Reads the pieces of one assistant's turn after its header.

    Args:
        degree: See above.
        tools: Those declared; they help to name a call whose id has no name.
    """

    def __init__(self, degree: Degree = "strict", tools: Sequence[ToolSpec] = ()) -> None:
        self._degree, self._tools = degree, tools
        self._state = _At.CONTENT
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._id = ""
        self._arguments: list[str] = []
        self._findings: list[Finding] = []

    @property
    def is_ended(self) -> bool:
        """Whether the turn has been closed."""
        return self._state == _At.ENDED

    def feed(self, pieces: Iterable[Piece]) -> list[Event]:
        """Events that ``pieces`` make.

        Raises:
            FormatError: in the degrees that raise.
        """
        events: list[Event] = []
        for piece in pieces:
            if self.is_ended:
                self._wrong("after_end", repr(piece.text[:40]))
            elif piece.is_control:
                self._token(piece.text, events)
            else:
                self._text(piece.text, events)
        return events

    def _wrong(self, kind: str, detail: str) -> None:
        if self._degree != "tolerant":
            raise FormatError(f"{kind.replace('_', ' ')} in {self._state}: {detail}")
        self._findings.append(Finding(kind, detail))

    def _text(self, text: str, events: list[Event]) -> None:
        match self._state:
            case _At.CONTENT:
                self._content.append(text)
                events.append(Event("content", text))
            case _At.ID:
                self._id += text
            case _At.ARGUMENTS:
                self._arguments.append(text)
                events.append(Event("arguments", text, len(self._calls)))
            case _:
                self._wrong("text_between_calls" if text.strip() else "space", repr(text[:40]))

    def _token(self, name: str, events: list[Event]) -> None:
        if name in VARIANTS:
            self._wrong("singular_token", name)
            name = VARIANTS[name]
        match (name, self._state):
            case (control.SECTION_BEGIN, _At.CONTENT):
                self._state = _At.SECTION
            case (control.CALL_BEGIN, _At.SECTION):
                self._begin_call()
            case (control.ARGUMENT_BEGIN, _At.ID):
                self._begin_arguments(events)
            case (control.CALL_END, _At.ARGUMENTS):
                self._end_call(events)
            case (control.SECTION_END, _At.SECTION):
                if not self._calls:
                    self._wrong("empty_section", name)
                self._state = _At.AFTER
            case (control.IM_END, _At.CONTENT | _At.AFTER):
                self._end(events)
            case _:
                self._unexpected(name, events)

    def _begin_call(self) -> None:
        self._state, self._id, self._arguments = _At.ID, "", []

    def _begin_arguments(self, events: list[Event]) -> None:
        self._state = _At.ARGUMENTS
        events.append(Event("call", self._id.strip(), len(self._calls)))

    def _end_call(self, events: list[Event]) -> None:
        self._add_call(is_whole=True)
        events.append(Event("call_end", self._calls[-1].id, len(self._calls) - 1))
        self._state = _At.SECTION

    def _end(self, events: list[Event]) -> None:
        self._state = _At.ENDED
        events.append(Event("end"))

    def _unexpected(self, name: str, events: list[Event]) -> None:
        """A token where none of its kind belongs: noted, then what it most likely meant."""
        self._wrong("unexpected_token", f"{name} in {self._state}")
        if name in (control.CALL_BEGIN, control.SECTION_END, control.SECTION_BEGIN, control.IM_END):
            self._close_call(events)
        match name:
            case control.CALL_BEGIN:
                self._cut_singular_name()
                self._begin_call()
            case control.IM_END:
                self._end(events)
            case control.SECTION_BEGIN:
                self._state = _At.SECTION
            case control.SECTION_END:
                self._state = _At.AFTER
            case control.CALL_END if self._state == _At.ID:
                # No arguments were begun: a call without any, or one whose token is missing.
                self._begin_arguments(events)
                self._end_call(events)

    def _cut_singular_name(self) -> None:
        """Letters a model wrote for the section token, before a call it began properly."""
        content = "".join(self._content)
        for name in VARIANTS:
            if content.rstrip().endswith(name):
                self._findings.append(Finding("singular_token", f"{name} as letters"))
                self._content = [content.rstrip().removesuffix(name)]

    def _close_call(self, events: list[Event]) -> None:
        if self._state == _At.ID:
            self._begin_arguments(events)
        if self._state == _At.ARGUMENTS:
            self._add_call(is_whole=False)
            events.append(Event("call_end", self._calls[-1].id, len(self._calls) - 1))

    def _add_call(self, *, is_whole: bool) -> None:
        identity, arguments = self._id, "".join(self._arguments)
        if self._degree == "tolerant":
            if identity.strip() != identity or arguments.strip() != arguments:
                self._wrong("space", f"around {identity.strip() or arguments[:40]!r}")
            identity, arguments = identity.strip(), arguments.strip()
        self._calls.append(ToolCall(identity, self._name(identity), arguments))
        if not is_whole:
            self._wrong("truncated_arguments", arguments[-40:])
        elif self._degree != "exact":
            self._check_arguments(arguments)

    def _name(self, identity: str) -> str:
        known = exact_name if self._degree == "exact" else strict_name
        name = known(identity)
        if name is None:
            name, kind = guessed_name(identity, self._tools)
            self._wrong(kind, repr(identity[:80]))
        return name

    def _check_arguments(self, arguments: str) -> None:
        try:
            value = json.loads(arguments, parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            at_end = isinstance(error, json.JSONDecodeError) and error.pos >= len(
                arguments.rstrip()
            )
            is_open = at_end or "Unterminated" in str(error)
            self._wrong("truncated_arguments" if is_open else "arguments_not_json", str(error))
            return
        if not isinstance(value, dict):
            self._wrong("arguments_not_object", f"{type(value).__name__}")

    def close(self) -> Completion:
        """The answer, after the last piece.

        Raises:
            FormatError: the degree wants a whole turn, and it is not closed.
        """
        is_finished = self.is_ended
        if not is_finished:
            self._wrong("unfinished", f"stopped in {self._state}")
            self._close_call([])
        return Completion(
            "".join(self._content), tuple(self._calls), is_finished, tuple(self._findings)
        )


class CompletionStream:
    """A lexer and a parser: chunks of ids or text in, events out.

    Args:
        lexer: Of the chunks' kind.
        parser: Of the degree wanted.
    """

    def __init__(self, lexer: Lexer, parser: CompletionParser) -> None:
        self._lexer, self._parser = lexer, parser

    def feed(self, chunk: str | Sequence[int]) -> list[Event]:
        """What the next chunk brings.

        Raises:
            FormatError: see ``CompletionParser.feed``.
        """
        return self._parser.feed(self._lexer.feed(chunk))

    def close(self) -> tuple[list[Event], Completion]:
        """The last events, and the whole answer.

        Raises:
            FormatError: see ``CompletionParser.close``.
        """
        events = self._parser.feed(self._lexer.close())
        return events, self._parser.close()


def parse_completion(
    lexer: Lexer,
    answer: str | Sequence[int],
    degree: Degree = "strict",
    tools: Sequence[ToolSpec] = (),
) -> Completion:
    """A whole answer at once.

    Raises:
        FormatError: in the degrees that raise.
    """
    stream = CompletionStream(lexer, CompletionParser(degree, tools))
    stream.feed(answer)
    return stream.close()[1]
