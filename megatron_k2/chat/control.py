"""K2's control tokens by name, and the ids a tokenizer gives them.

Text is encoded apart from control tokens, always as ordinary text, so a name of one that a user or
a tool writes stays letters. That rests on the tokenizer, and is tried here once for each.
"""

from dataclasses import dataclass
from typing import Protocol

from megatron_k2.errors import UserError

IM_END, IM_MIDDLE = "<|im_end|>", "<|im_middle|>"
IM_USER, IM_ASSISTANT, IM_SYSTEM = "<|im_user|>", "<|im_assistant|>", "<|im_system|>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"

OPENERS = (IM_SYSTEM, IM_USER, IM_ASSISTANT)
"""What a turn begins with."""
CHAT_TOKENS = (
    *(IM_END, IM_USER, IM_ASSISTANT, IM_SYSTEM, IM_MIDDLE),
    *(SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END),
)
"""The ten that a dialogue is written with."""


class ChatTokenizer(Protocol):
    """What the chat format needs of a tokenizer of ``data/tokenizer.py``."""

    special_ids: dict[str, int]
    """Name to id of the control tokens."""
    identity: str

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; names of control tokens in it stay letters."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""


@dataclass(frozen=True)
class ControlIds:
    """Ids of the chat format's tokens in one tokenizer."""

    by_name: dict[str, int]
    by_id: dict[int, str]


def control_ids(tokenizer: ChatTokenizer) -> ControlIds:
    """The ids of ``CHAT_TOKENS``.

    Raises:
        UserError: the tokenizer lacks one, or makes one of the letters of its name.
    """
    names = getattr(tokenizer, "special_ids", {})
    missing = [name for name in CHAT_TOKENS if name not in names]
    if missing:
        raise UserError(
            f"this tokenizer has no control token {', '.join(missing)}; K2's chat format needs "
            "K2's tokenizer, or a BPE trained by megatron-k2 data prepare --train-bpe"
        )
    found = {name: names[name] for name in CHAT_TOKENS}
    if leaking := _leaking(tokenizer, names):
        raise UserError(
            f"this tokenizer turns the letters {leaking[0]} in a text into the control token, so "
            'that a user could end a turn; mark it "special": true in its tokenizer.json'
        )
    return ControlIds(found, {number: name for name, number in found.items()})


def _leaking(tokenizer: ChatTokenizer, names: dict[str, int]) -> list[str]:
    ids = set(names.values())
    return [name for name in names if not ids.isdisjoint(tokenizer.encode(name))]
