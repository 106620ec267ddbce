"""Query rows and the keys they see: of one sequence, or of every document of a pack."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from megatron_k2.model.packed import PackLayout


@dataclass(frozen=True)
class Segment:
    """Consecutive query rows, and which keys they see: those of their document up to themselves."""

    first_row: int
    num_rows: int
    first_position: int
    """Of the first row, within its document."""
    first_key: int = 0
    """Where the document begins among the keys."""


class Block(NamedTuple):
    """Query rows [start, end) that are computed at once."""

    start: int
    end: int
    position: int
    first_key: int

    @property
    def end_key(self) -> int:
        """One past the last key that its last row sees."""
        return self.first_key + self.position + self.end - self.start


def whole_sequence(num_rows: int) -> tuple[Segment, ...]:
    """Queries and keys are the same tokens."""
    return (Segment(0, num_rows, 0),)


def document_segments(layout: PackLayout, cp_size: int, cp_rank: int) -> tuple[Segment, ...]:
    """A rank's rows of tokens; padding is in none.

    Of each document rank r of c holds chunks r and 2c-1-r of 2c (``PackLayout.rows_of_rank``).
    Where documents go on from others, keys are in the order of ``PackLayout.key_spans``.
    """
    if layout.beginnings:
        return _continued_segments(layout)
    found, row = [], 0
    num_chunks = 1 if cp_size == 1 else 2 * cp_size
    here = (0,) if cp_size == 1 else (cp_rank, 2 * cp_size - 1 - cp_rank)
    spans = itertools.pairwise(layout.bounds)
    for (start, end), length in zip(spans, layout.lengths, strict=True):
        chunk = (end - start) // num_chunks
        for number in here:
            num_tokens = min(chunk, length - number * chunk)
            if num_tokens > 0:
                found.append(Segment(row, num_tokens, number * chunk, start))
            row += chunk
    return tuple(found)


def _continued_segments(layout: PackLayout) -> tuple[Segment, ...]:
    found, first_key = [], 0
    spans = itertools.pairwise(layout.bounds)
    for (start, end), length, first in zip(
        spans, layout.lengths, layout.first_positions, strict=True
    ):
        if length:
            found.append(Segment(start, length, first, first_key))
        first_key += first + end - start
    return tuple(found)


def blocks_of(segments: tuple[Segment, ...], rows_per_block: int) -> list[Block]:
    """Every segment in blocks of at most so many rows."""
    return [
        Block(
            segment.first_row + start,
            segment.first_row + min(start + rows_per_block, segment.num_rows),
            segment.first_position + start,
            segment.first_key,
        )
        for segment in segments
        for start in range(0, segment.num_rows, rows_per_block)
    ]
