"""Messages and tools to text, to token ids, and to the loss mask: one walk for all three.

A dialogue is first written as pieces: a control token or a run of text, each trained or not. Text
is the pieces joined. Ids are the pieces encoded one by one, so the mask is known with them and
never searched for in the text, and a control token's name in somebody's text stays letters. Between
two control tokens text is encoded whole, as K2's tokenizer does; encoding ``## Return of …`` apart
from what follows gives other ids.

Generations of the public template (each is checked against recorded renderings in ``tests/chat``):

* ``0905``: Kimi-K2-Instruct since the correction of October 2025, and 0905. The default.
* ``0905-first``: its file of August to October 2025. Four spaces stand before a tool's result.
* ``0711``: the first release, which drops an assistant's tool calls; they are refused here.
* ``thinking``: K2-Thinking. It rewrites earlier turns when a later one comes, so it has no prefix
  property and is written as text only.

Trained are an assistant's content, its tool calls, and the ``<|im_end|>`` that closes it; the
header before them is the prompt's.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from megatron_k2.chat import control
from megatron_k2.chat.control import ChatTokenizer, control_ids
from megatron_k2.chat.declarations import json_declarations, typescript_declarations
from megatron_k2.errors import UserError
from megatron_k2.records.messages import Message, ToolCall, ToolSpec

Generation = Literal["0905", "0905-first", "0711", "thinking"]
GENERATIONS: tuple[str, ...] = get_args(Generation)
Declarations = Literal["json", "typescript"]

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
DEFAULT_SYSTEM_0711 = "You are a helpful assistant"
RETURN_OF = "## Return of "
_NUM_COMMON, _COMMON_CHARS = 512, 1 << 14
"""How many texts' ids a renderer keeps, and the longest of them: at most about 80 MB."""
DECLARE = "tool_declare"
_TITLES = ("system", "tool", DECLARE)
_OPENERS = {
    "user": control.IM_USER,
    "assistant": control.IM_ASSISTANT,
    "system": control.IM_SYSTEM,
    "tool": control.IM_SYSTEM,
}


class Piece(NamedTuple):
    """A control token by name, or a run of ordinary text."""

    text: str
    is_control: bool = False
    is_trained: bool = False
    is_common: bool = False
    """Whether many dialogues hold the same text, so that its ids are worth keeping."""


@dataclass(frozen=True)
class Rendered:
    """A dialogue as tokens."""

    ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """1 where the token at the *same* place is a target: not shifted."""


@dataclass(frozen=True)
class Format:
    """Which template is written."""

    generation: Generation = "0905"
    declarations: Declarations = "json"
    default_system: str | None = None
    """Instead of the generation's own text where a dialogue has no system message first."""

    def __post_init__(self) -> None:
        if self.generation not in GENERATIONS:
            raise UserError(
                f"template generation {self.generation!r}: one of {', '.join(GENERATIONS)}"
            )
        if self.declarations not in get_args(Declarations):
            raise UserError(f"tool declarations {self.declarations!r}: json or typescript")

    @property
    def is_incremental(self) -> bool:
        """Whether a longer dialogue begins with the ids of its first messages."""
        return self.generation != "thinking"


CANONICAL = Format()


_CONTEXT = {name: Piece(name, is_control=True) for name in control.CHAT_TOKENS}
_TARGET = {name: Piece(name, is_control=True, is_trained=True) for name in control.CHAT_TOKENS}
"""Control tokens, by whether they are trained; made once, for a dialogue has dozens."""


@functools.lru_cache(maxsize=_NUM_COMMON)
def _header(opener: str, title: str) -> tuple[Piece, ...]:
    return _CONTEXT[opener], Piece(title, is_common=True), _CONTEXT[control.IM_MIDDLE]


def _turn(opener: str, title: str, body: str, *, is_common: bool = False) -> list[Piece]:
    """A turn that nobody is trained on."""
    text = Piece(body, is_common=is_common)
    return [*_header(opener, title), text, _CONTEXT[control.IM_END]]


def opening(first: Message | None, tools: Sequence[ToolSpec], form: Format) -> list[Piece]:
    """What stands before the first message: tool declarations, the default system text."""
    pieces: list[Piece] = []
    if tools:
        pieces += _turn(control.IM_SYSTEM, DECLARE, _declared(tools, form), is_common=True)
    if first is not None and first.role != "system":
        is_first_release = form.generation == "0711"
        text = DEFAULT_SYSTEM_0711 if is_first_release else DEFAULT_SYSTEM
        if form.default_system is not None:
            text = form.default_system
        pieces += _turn(control.IM_SYSTEM, "system", text, is_common=True)
        if form.generation == "0905":
            pieces.append(Piece("\n"))
    return pieces


def _declared(tools: Sequence[ToolSpec], form: Format) -> str:
    if form.declarations == "typescript":
        return typescript_declarations(tools)
    if form.generation == "0711":
        return json_declarations(tools, is_sorted=False, is_compact=False)
    if form.generation == "0905-first":
        # The white space is the file's own: its lines were indented.
        return f"\n  # Tools\n  {json_declarations(tools, is_sorted=True, is_compact=False)}"
    return json_declarations(tools, is_sorted=True, is_compact=True)


def turn(message: Message, form: Format, *, is_past: bool = True) -> list[Piece]:
    """One message.

    Args:
        message: What to write.
        form: How.
        is_past: K2-Thinking only: whether the thoughts of this turn are dropped.

    Raises:
        UserError: this generation cannot write the message.
    """
    has_names = form.generation != "0711"
    title = (message.name or message.role) if has_names else message.role
    if message.role == "assistant":
        return _assistant(message, title, form, is_past)
    if message.role != "user":
        _check_kind(message, title)
    body = message.content
    if message.role == "tool" and has_names:
        indent = "    " if form.generation == "0905-first" else ""
        body = f"{RETURN_OF}{message.tool_call_id}\n{indent}{body}"
    return _turn(_OPENERS[message.role], title, body, is_common=message.role == "system")


def _assistant(message: Message, title: str, form: Format, is_past: bool) -> list[Piece]:
    trained = message.is_trained
    content = message.content
    if form.generation == "thinking":
        thoughts = "" if is_past else message.reasoning or ""
        content = f"<think>{thoughts}</think>{content}"
    token = _TARGET if trained else _CONTEXT
    pieces = [*_header(control.IM_ASSISTANT, title), Piece(content, is_trained=trained)]
    if message.tool_calls:
        _check_calls(message.tool_calls, form)
        pieces.append(token[control.SECTION_BEGIN])
        for call in message.tool_calls:
            pieces += [
                token[control.CALL_BEGIN],
                Piece(call.id, is_trained=trained, is_common=True),
                token[control.ARGUMENT_BEGIN],
                Piece(call.arguments, is_trained=trained),
                token[control.CALL_END],
            ]
        pieces.append(token[control.SECTION_END])
    pieces.append(token[control.IM_END])
    return pieces


def _check_calls(calls: Sequence[ToolCall], form: Format) -> None:
    if form.generation == "0711":
        raise UserError(
            f"the template of 2025-07-11 drops an assistant's tool calls ({calls[0].name}), so a "
            "model would learn to be silent; choose 0905"
        )
    if not all(call.id for call in calls):
        raise UserError(
            "a tool call without an id; megatron_k2.chat.call_ids numbers a dialogue's calls"
        )


def _check_kind(message: Message, title: str) -> None:
    """System texts, results and declarations have one opener, and are told apart by what follows.

    No name from outside may make a tool's result read as a declaration, or a system text as a
    result.
    """
    is_taken = title in _TITLES and title != message.role
    reads_as_result = message.role == "system" != title and message.content.startswith(RETURN_OF)
    if is_taken or reads_as_result:
        raise UserError(
            f"a {message.role} message named {title!r} would read as one of another kind; rename it"
        )
    if "\n" in (message.tool_call_id or ""):
        raise UserError(
            f"tool_call_id {message.tool_call_id!r} has a line end; write it on one line"
        )


def generation_prompt() -> list[Piece]:
    """What an assistant's answer follows; the same in every generation."""
    return list(_header(control.IM_ASSISTANT, "assistant"))


def pieces_of(
    messages: Sequence[Message],
    tools: Sequence[ToolSpec] = (),
    form: Format = CANONICAL,
    *,
    add_generation_prompt: bool = False,
) -> Iterator[Piece]:
    """The whole dialogue."""
    yield from opening(messages[0] if messages else None, tools, form)
    past = _num_past(messages) if form.generation == "thinking" else len(messages)
    for number, message in enumerate(messages):
        yield from turn(message, form, is_past=number < past)
    if add_generation_prompt:
        yield from generation_prompt()


def _num_past(messages: Sequence[Message]) -> int:
    """K2-Thinking keeps the thoughts of what follows the last answer that calls no tool."""
    for number in range(len(messages), 0, -1):
        message = messages[number - 1]
        if message.role == "assistant" and not message.tool_calls:
            return number
    return 0


def render_text(
    messages: Sequence[Message],
    tools: Sequence[ToolSpec] = (),
    form: Format = CANONICAL,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The dialogue's text, for reading and comparing; ids are never made from it.

    Raises:
        UserError: see ``turn``.
    """
    found = pieces_of(messages, tools, form, add_generation_prompt=add_generation_prompt)
    return "".join(piece.text for piece in found)


class Renderer:
    """Writes dialogues as tokens of one tokenizer.

    Args:
        tokenizer: With K2's control tokens.
        form: Which template; not ``thinking``.

    Raises:
        UserError: the tokenizer lacks a control token, or the template has no ids.
    """

    def __init__(self, tokenizer: ChatTokenizer, form: Format = CANONICAL) -> None:
        if not form.is_incremental:
            raise UserError(
                f"template {form.generation} rewrites earlier turns when a later one comes; it is "
                "written as text only (render_text)"
            )
        self.tokenizer = tokenizer
        self.form = form
        self.control = control_ids(tokenizer)
        self._ids_of_common = functools.lru_cache(maxsize=_NUM_COMMON)(tokenizer.encode)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Ids and loss mask of a dialogue.

        Raises:
            UserError: see ``turn``.
        """
        form = self.form
        found = Rendered()
        pieces = pieces_of(messages, tools, form, add_generation_prompt=add_generation_prompt)
        self.extend(found, pieces)
        return found

    def extend(self, found: Rendered, pieces: Iterator[Piece] | list[Piece]) -> None:
        """Append what ``pieces`` encode to."""
        ids, mask, names = found.ids, found.loss_mask, self.control.by_name
        encode, encode_common = self.tokenizer.encode, self._ids_of_common
        for text, is_control, is_trained, is_common in pieces:
            if is_control:
                ids.append(names[text])
                mask.append(1 if is_trained else 0)
            elif text:
                is_kept = is_common and len(text) <= _COMMON_CHARS
                new = encode_common(text) if is_kept else encode(text)
                ids += new
                mask += [1 if is_trained else 0] * len(new)
