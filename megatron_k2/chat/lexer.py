"""Ids or text to pieces, in chunks of any size: the first half of every parser.

From ids, a control token is its id and letters are letters. From text (a server's answer, a log)
the two look alike, so a control token's name is taken for the token: only text of a model may be
read so, never what a user or a tool wrote.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from megatron_k2.chat.control import (
    ARGUMENT_BEGIN,
    CHAT_TOKENS,
    SECTION_BEGIN,
    SECTION_END,
    ChatTokenizer,
)
from megatron_k2.chat.template import Piece

VARIANTS = {
    "<|tool_call_section_begin|>": SECTION_BEGIN,
    "<|tool_call_section_end|>": SECTION_END,
    "<|tool_arguments_begin|>": ARGUMENT_BEGIN,
}
"""Spellings of the report's appendix B, which models and servers also write."""
_REPLACEMENT = "\ufffd"


class Lexer(Protocol):
    """Chunks to pieces; what a piece may still grow into is held back."""

    def feed(self, chunk: str | Sequence[int]) -> list[Piece]:
        """The pieces that the next chunk completes; text comes in as many as there were chunks."""

    def close(self) -> list[Piece]:
        """What was held back."""


class TextLexer:
    """Text, in chunks.

    Args:
        allows_variants: Whether ``VARIANTS`` are control tokens too, as themselves.
    """

    def __init__(self, *, allows_variants: bool = False) -> None:
        names = (*CHAT_TOKENS, *(VARIANTS if allows_variants else ()))
        self._names = names
        self._pattern = re.compile("|".join(map(re.escape, names)))
        self._held = ""

    def feed(self, chunk: str | Sequence[int]) -> list[Piece]:
        """See ``Lexer``."""
        assert isinstance(chunk, str)
        text, pieces, start = self._held + chunk, [], 0
        for found in self._pattern.finditer(text):
            if found.start() > start:
                pieces.append(Piece(text[start : found.start()]))
            pieces.append(Piece(found[0], is_control=True))
            start = found.end()
        keep = self._begun(text, start)
        if keep > start:
            pieces.append(Piece(text[start:keep]))
        self._held = text[keep:]
        return pieces

    def _begun(self, text: str, start: int) -> int:
        """Where a control token's name may have begun at the end of the text."""
        longest = max(map(len, self._names)) - 1
        at = text.find("<", max(start, len(text) - longest))
        while at >= 0:
            if any(name.startswith(text[at:]) for name in self._names):
                return at
            at = text.find("<", at + 1)
        return len(text)

    def close(self) -> list[Piece]:
        """See ``Lexer``."""
        held, self._held = self._held, ""
        return [Piece(held)] if held else []


class IdLexer:
    """Token ids, in chunks; a letter whose bytes are spread over tokens waits for the last."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._control = {number: name for name, number in tokenizer.special_ids.items()}
        self._held: list[int] = []

    def feed(self, chunk: str | Sequence[int]) -> list[Piece]:
        """See ``Lexer``."""
        assert not isinstance(chunk, str)
        pieces: list[Piece] = []
        for number in chunk:
            if number in self._control:
                pieces += self.close()
                pieces.append(Piece(self._control[number], is_control=True))
            else:
                self._held.append(number)
        if ready := self._num_settled():
            pieces.append(Piece(self._tokenizer.decode(self._held[:ready])))
            self._held = self._held[ready:]
        return pieces

    def _num_settled(self) -> int:
        """How many held ids have a text that no later id changes.

        U+FFFD stands for bytes that are no letter yet. A cut inside such bytes decodes to more of
        them than the whole does, so a cut is safe where both sides decode to the whole.
        """
        whole = self._tokenizer.decode(self._held)
        if not whole.endswith(_REPLACEMENT):
            return len(self._held)
        for cut in range(len(self._held) - 1, max(0, len(self._held) - 5), -1):
            left, right = (self._tokenizer.decode(part) for part in self._cut(cut))
            if left + right == whole:
                return cut
        return 0

    def _cut(self, at: int) -> tuple[list[int], list[int]]:
        return self._held[:at], self._held[at:]

    def close(self) -> list[Piece]:
        """See ``Lexer``."""
        held, self._held = self._held, []
        text = self._tokenizer.decode(held) if held else ""
        return [Piece(text)] if text else []
