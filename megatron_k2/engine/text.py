"""Tokens to text as they come: whole characters only, and strings that end an answer."""

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "�"
"""What ``decode`` ends with while a character's bytes are not all there."""


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""


class TextPieces:
    """New text of a growing row of tokens.

    Only the last few tokens are decoded again: what a token adds depends on its neighbours, and a
    character may take several.

    Args:
        decoder: the tokenizer.
        before: what the row follows; its text is not given out.
    """

    def __init__(self, decoder: Decoder, before: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._before = list(before)
        self._open: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        """Text that is whole now."""
        self._open += ids
        before = self._decoder.decode(self._before)
        whole = self._decoder.decode(self._before + self._open)
        if whole.endswith(INCOMPLETE):
            return ""
        self._before, self._open = self._open, []
        return whole[len(before) :]

    def close(self) -> str:
        """What is left, its broken character as a replacement."""
        before = self._decoder.decode(self._before)
        left, self._open = self._open, []
        return self._decoder.decode(self._before + left)[len(before) :]


class StopStrings:
    """Cuts a text at the first of some strings, wherever it is broken into pieces.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None
        """Which one ended the text; it is not part of it."""

    def feed(self, text: str) -> str:
        """What may be shown: all but a tail that could begin one of the strings."""
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(text.find(s), s) for s in self._strings if s in text]
        if places:
            at, self.found = min(places)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self._strings), default=0)
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return shown

    def close(self) -> str:
        """The tail, where nothing came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Letters at the end of ``text`` with which ``string`` begins, never all of it."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
