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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from megatron_k2.chat import control
from megatron_k2.chat.control import ChatTokenizer, control_ids
from megatron_k2.chat.declarations import json_declarations, typescript_declarations
from megatron_k2.errors import UserError
from megatron_k2.records.messages import Message, ToolSpec

Generation = Literal["0905", "0905-first", "0711", "thinking"]
GENERATIONS: tuple[str, ...] = get_args(Generation)
Declarations = Literal["json", "typescript"]

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
DEFAULT_SYSTEM_0711 = "You are a helpful assistant"
RETURN_OF = "## Return of "
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


def _control(name: str, *, is_trained: bool = False) -> Piece:
    return Piece(name, is_control=True, is_trained=is_trained)


def _turn(opener: str, title: str, body: str) -> list[Piece]:
    """A turn that nobody is trained on."""
    return [
        _control(opener),
        Piece(title),
        _control(control.IM_MIDDLE),
        Piece(body),
        _control(control.IM_END),
    ]


def opening(first: Message | None, tools: Sequence[ToolSpec], form: Format) -> list[Piece]:
    """What stands before the first message: tool declarations, the default system text."""
    pieces: list[Piece] = []
    if tools:
        pieces += _turn(control.IM_SYSTEM, DECLARE, _declared(tools, form))
    if first is not None and first.role != "system":
        is_first_release = form.generation == "0711"
        text = DEFAULT_SYSTEM_0711 if is_first_release else DEFAULT_SYSTEM
        if form.default_system is not None:
            text = form.default_system
        pieces += _turn(control.IM_SYSTEM, "system", text)
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
    _check(message, title, form)
    if message.role == "assistant":
        return _assistant(message, title, form, is_past)
    body = message.content
    if message.role == "tool" and has_names:
        indent = "    " if form.generation == "0905-first" else ""
        body = f"{RETURN_OF}{message.tool_call_id}\n{indent}{body}"
    return _turn(_OPENERS[message.role], title, body)


def _assistant(message: Message, title: str, form: Format, is_past: bool) -> list[Piece]:
    trained = message.is_trained
    content = message.content
    if form.generation == "thinking":
        thoughts = "" if is_past else message.reasoning or ""
        content = f"<think>{thoughts}</think>{content}"
    pieces = [_control(control.IM_ASSISTANT), Piece(title), _control(control.IM_MIDDLE)]
    pieces.append(Piece(content, is_trained=trained))
    if message.tool_calls:
        pieces.append(_control(control.SECTION_BEGIN, is_trained=trained))
        for call in message.tool_calls:
            pieces += [
                _control(control.CALL_BEGIN, is_trained=trained),
                Piece(call.id, is_trained=trained),
                _control(control.ARGUMENT_BEGIN, is_trained=trained),
                Piece(call.arguments, is_trained=trained),
                _control(control.CALL_END, is_trained=trained),
            ]
        pieces.append(_control(control.SECTION_END, is_trained=trained))
    pieces.append(_control(control.IM_END, is_trained=trained))
    return pieces


def _check(message: Message, title: str, form: Format) -> None:
    if form.generation == "0711" and message.tool_calls:
        raise UserError(
            f"the template of 2025-07-11 drops an assistant's tool calls "
            f"({message.tool_calls[0].name}), so a model would learn to be silent; choose 0905"
        )
    if any(not call.id for call in message.tool_calls):
        raise UserError(
            "a tool call without an id; megatron_k2.chat.call_ids numbers a dialogue's calls"
        )
    # All three are written with one opener and told apart by title and first words only: no name
    # from outside may make a tool's result read as a declaration, or a system text as a result.
    is_system = message.role == "system"
    taken = _TITLES if message.role in ("system", "tool") else ()
    if (title in taken and title != message.role) or (
        is_system and title != "system" and message.content.startswith(RETURN_OF)
    ):
        raise UserError(
            f"a {message.role} message named {title!r} would read as one of another kind; rename it"
        )
    if "\n" in (message.tool_call_id or ""):
        raise UserError(
            f"tool_call_id {message.tool_call_id!r} has a line end; give it on one line"
        )


def generation_prompt() -> list[Piece]:
    """What an assistant's answer follows; the same in every generation."""
    return [
        _control(control.IM_ASSISTANT),
        Piece("assistant"),
        _control(control.IM_MIDDLE),
    ]


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
        for piece in pieces:
            if piece.is_control:
                ids.append(names[piece.text])
                mask.append(int(piece.is_trained))
            elif piece.text:
                new = self.tokenizer.encode(piece.text)
                ids += new
                mask += [int(piece.is_trained)] * len(new)
