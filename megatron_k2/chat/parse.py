"""A whole dialogue read back from its canonical (0905) rendering: messages and tools.

``parse(render(x)) == x`` for dialogues whose calls have K2's ids and tools declared as JSON. Not in
the rendering, so not read back: thoughts, weights, the order of keys in a declaration, the empty
list against no list.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_k2.chat import control
from megatron_k2.chat.completion import CompletionParser, FormatError
from megatron_k2.chat.control import ChatTokenizer
from megatron_k2.chat.lexer import IdLexer, Lexer, TextLexer
from megatron_k2.chat.template import DECLARE, DEFAULT_SYSTEM, RETURN_OF, Piece
from megatron_k2.records.messages import Message, Role, ToolSpec
from megatron_k2.records.read import tool_from


@dataclass(frozen=True)
class ParsedDialogue:
    """What a rendering holds."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    has_generation_prompt: bool
    """Whether it ends in an assistant's header that nothing follows."""


def parse_ids(ids: Sequence[int], tokenizer: ChatTokenizer) -> ParsedDialogue:
    """A dialogue's token ids; names of control tokens in texts are letters.

    Raises:
        FormatError: they are not what the template writes.
    """
    return _parse(_pieces(IdLexer(tokenizer), ids))


def parse_text(text: str) -> ParsedDialogue:
    """A dialogue's text, in which every name of a control token is taken for the token.

    Raises:
        FormatError: it is not what the template writes.
    """
    return _parse(_pieces(TextLexer(), text))


def _pieces(lexer: Lexer, whole: str | Sequence[int]) -> list[Piece]:
    """All pieces, texts that touch each other joined."""
    joined: list[Piece] = []
    for piece in [*lexer.feed(whole), *lexer.close()]:
        if joined and not (piece.is_control or joined[-1].is_control):
            joined[-1] = Piece(joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


@dataclass(frozen=True)
class _Turn:
    opener: str
    title: str
    body: list[Piece]
    """Up to the token that closes it, or to the end."""
    is_closed: bool
    newline_follows: bool


def _turns(pieces: list[Piece]) -> list[_Turn]:
    starts = [
        n for n, piece in enumerate(pieces) if piece.is_control and piece.text in control.OPENERS
    ]
    if pieces and (not starts or starts[0]):
        raise FormatError(f"a dialogue begins with {pieces[0].text[:40]!r}, not with a turn")
    return [_turn(pieces[a:b]) for a, b in pairwise([*starts, len(pieces)])]


def _turn(pieces: list[Piece]) -> _Turn:
    header = [piece.text for piece in pieces[:3]]
    if len(pieces) < 3 or pieces[1].is_control or header[2] != control.IM_MIDDLE:
        raise FormatError(f"a turn's header is {''.join(header)[:80]!r}")
    end = Piece(control.IM_END, is_control=True)
    closing = pieces.index(end) if end in pieces else len(pieces)
    rest = "".join(piece.text for piece in pieces[closing + 1 :])
    if rest not in ("", "\n"):
        raise FormatError(f"{rest[:40]!r} between two turns")
    return _Turn(header[0], header[1], pieces[3:closing], closing < len(pieces), bool(rest))


def _parse(pieces: list[Piece]) -> ParsedDialogue:
    turns = _turns(pieces)
    tools: tuple[ToolSpec, ...] = ()
    if turns and (turns[0].opener, turns[0].title) == (control.IM_SYSTEM, DECLARE):
        tools = _tools(_body(turns.pop(0)))
    if turns and turns[0].newline_follows:
        default = turns.pop(0)
        if (default.opener, default.title) != (control.IM_SYSTEM, "system") or (
            _body(default) != DEFAULT_SYSTEM
        ):
            raise FormatError("a line end after a turn that is not the default system text")
        if turns and turns[0].opener == control.IM_SYSTEM and _is_system(turns[0]):
            raise FormatError("the default system text before a system message")
    has_prompt = bool(turns) and not turns[-1].is_closed
    if has_prompt:
        last = turns.pop()
        if (last.opener, last.title, last.body) != (control.IM_ASSISTANT, "assistant", []):
            raise FormatError(f"a turn of {last.title[:40]!r} is not closed")
    return ParsedDialogue(tuple(_message(turn) for turn in turns), tools, has_prompt)


def _is_system(turn: _Turn) -> bool:
    return turn.title == "system" or (
        turn.title != "tool" and not _body(turn).startswith(RETURN_OF)
    )


def _body(turn: _Turn) -> str:
    if any(piece.is_control for piece in turn.body):
        raise FormatError(f"a control token inside a turn of {turn.title[:40]!r}")
    return "".join(piece.text for piece in turn.body)


def _tools(declared: str) -> tuple[ToolSpec, ...]:
    try:
        values = json.loads(declared)
        return tuple(tool_from(value) for value in values)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"tool declarations are not a JSON list of tools ({error})") from None


def _message(turn: _Turn) -> Message:
    if turn.newline_follows:
        raise FormatError(f"a line end after a turn of {turn.title[:40]!r}")
    if not turn.is_closed:
        raise FormatError(f"a turn of {turn.title[:40]!r} is not closed")
    if turn.opener == control.IM_ASSISTANT:
        parser = CompletionParser("exact")
        parser.feed([*turn.body, Piece(control.IM_END, is_control=True)])
        answer = parser.close()
        return Message("assistant", answer.content, turn.title, tool_calls=answer.tool_calls)
    body = _body(turn)
    if turn.opener == control.IM_USER:
        return Message("user", body, turn.title)
    if turn.title == DECLARE:
        raise FormatError("tool declarations after the first turn")
    role: Role = "system" if _is_system(turn) else "tool"
    if role == "system":
        return Message("system", body, turn.title)
    head, newline, content = body.removeprefix(RETURN_OF).partition("\n")
    if not body.startswith(RETURN_OF) or not newline or not head:
        raise FormatError(f"a tool's result does not begin with {RETURN_OF!r} and an id")
    return Message("tool", content, turn.title, tool_call_id=head)
