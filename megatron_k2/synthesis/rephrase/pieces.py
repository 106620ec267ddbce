"""A document as excerpts and pieces, cut at ends of sentences by tokens; joined, they are the text.

The report's Figure 4 shows an excerpt of 4,096 tokens and pieces of 256, read from its labels. A
fenced block is a piece that is copied, not asked for. A sentence longer than a piece stays whole.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.fidelity.sentences import sentences

PIECE_TOKENS, EXCERPT_TOKENS = 256, 4096
_FENCE = re.compile(r"^(`{3,}|~{3,})", re.MULTILINE)
_WORDS = re.compile(r"[^\W_]+|[^\w\s]|_")
_LETTERS_PER_TOKEN = 5
"""Longer words count as more; ours, where no tokenizer is named."""

type Counter = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Piece:
    """What one request is about."""

    text: str
    num_tokens: int
    is_copied: bool = False
    """A fenced block."""


@dataclass(frozen=True)
class Cut:
    """Sizes, in tokens.

    Raises:
        UserError: a piece does not fit into an excerpt.
    """

    piece_tokens: int = PIECE_TOKENS
    excerpt_tokens: int = EXCERPT_TOKENS

    def __post_init__(self) -> None:
        if not 0 < self.piece_tokens <= self.excerpt_tokens:
            raise UserError(
                f"pieces of {self.piece_tokens} tokens in excerpts of {self.excerpt_tokens}: "
                "expected 0 < piece <= excerpt"
            )


def counter_of(tokenizer: str | None) -> Counter:
    """The tokens that a tokenizer makes of a text; without one, an estimate from its words."""
    if tokenizer is None:
        return estimated_tokens
    from megatron_k2.data.tokenizer import load_tokenizer

    encode = load_tokenizer(Path(tokenizer)).encode
    return lambda text: len(encode(text))


def estimated_tokens(text: str) -> int:
    """Words and marks, long words as several: within about a fifth of BPE on English prose."""
    return sum(-(-len(word) // _LETTERS_PER_TOKEN) for word in _WORDS.findall(text))


def excerpts(text: str, count: Counter, cut: Cut | None = None) -> list[list[Piece]]:
    """Excerpts of pieces; every sentence of the text is in exactly one piece, in order."""
    cut = cut or Cut()
    pieces = _joined(
        ((each, count(each), _is_fence(each)) for each in sentences(text)), cut.piece_tokens
    )
    found: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not found or piece.num_tokens > room:
            found.append([])
            room = cut.excerpt_tokens
        found[-1].append(piece)
        room -= piece.num_tokens
    return found


def _joined(parts: Iterable[tuple[str, int, bool]], most: int) -> list[Piece]:
    """Neighbouring sentences together while they fit; fences alone."""
    found: list[Piece] = []
    for text, num_tokens, is_fence in parts:
        last = found[-1] if found else None
        if last is None or is_fence or last.is_copied or last.num_tokens + num_tokens > most:
            found.append(Piece(text, num_tokens, is_fence))
        else:
            found[-1] = Piece(last.text + text, last.num_tokens + num_tokens)
    return found


def _is_fence(text: str) -> bool:
    return bool(_FENCE.match(text))


def stitched(rewrites: Iterable[str], pieces: Iterable[Piece]) -> str:
    """Rewrites one after another, apart as their pieces were: by a blank line, a line, a space."""
    found, gap = "", ""
    for rewrite, piece in zip(rewrites, pieces, strict=True):
        found += gap + rewrite.strip("\n" if piece.is_copied else None)
        tail = piece.text[len(piece.text.rstrip()) :]
        has_lines = "\n" in rewrite.strip()
        gap = "\n\n" if tail.count("\n") > 1 else "\n" if "\n" in tail or has_lines else " "
    return found
