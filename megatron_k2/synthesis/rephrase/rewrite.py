"""Chunk-wise autoregressive rewriting: the report's Figure 4, piece by piece.

Each piece is rewritten given the whole excerpt and what has been written so far, which feeds back;
the rewrites are stitched. An excerpt begins anew: what passes between two is not stated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.synthesis.llm.model import Model
from megatron_k2.synthesis.llm.schema import SchemaError
from megatron_k2.synthesis.rephrase.coverage import piece_problem
from megatron_k2.synthesis.rephrase.pieces import Piece, stitched
from megatron_k2.synthesis.rephrase.prompts import ANSWER, Prompt

TRIES = 2
"""Samples of a piece before its document is rejected; ours."""
_ROOM = 4
"""Tokens of an answer for each of its piece, JSON and other words included."""
_LEAST_ROOM = 256


class PieceError(ValueError):
    """A piece has no rewrite that can stand for it.

    Args:
        stage: where that was seen.
        reason: a sentence.
        written: up to and with what was refused.
    """

    def __init__(self, stage: str, reason: str, written: str) -> None:
        super().__init__(reason)
        self.stage, self.reason, self.written = stage, reason, written


@dataclass(frozen=True)
class Pair:
    """A piece, its rewrite, and what stands before the piece in its excerpt."""

    piece: Piece
    rewrite: str
    before: str


async def rewritten(
    model: Model,
    prompt: Prompt,
    excerpts: Sequence[Sequence[Piece]],
    seed: int,
    *,
    is_translated: bool = False,
) -> list[Pair]:
    """All pieces of a document.

    Raises:
        PieceError: one cannot be had.
        Exception: what the model raises.
    """
    found: list[Pair] = []
    for pieces in excerpts:
        excerpt = "".join(piece.text for piece in pieces)
        own: list[Pair] = []
        before = ""
        for number, piece in enumerate(pieces):
            written = stitched([pair.rewrite for pair in own], pieces[:number])
            if piece.is_copied:
                text = piece.text
            else:
                job = _Asked(model, prompt, excerpt, before, written, piece, seed)
                text = await job.rewrite(is_translated)
            own.append(Pair(piece, text, before))
            before += piece.text
        found += own
    return found


def whole(pairs: Sequence[Pair]) -> str:
    """The rewrite of a document."""
    return stitched([pair.rewrite for pair in pairs], [pair.piece for pair in pairs])


@dataclass(frozen=True)
class _Asked:
    """One piece's request."""

    model: Model
    prompt: Prompt
    excerpt: str
    before: str
    written: str
    piece: Piece
    seed: int

    async def rewrite(self, is_translated: bool) -> str:
        """Its text, of the first sample that can stand for the piece."""
        stage = problem = said = ""
        for sample in range(TRIES):
            try:
                text = await self._sample(sample)
            except SchemaError as error:
                stage, problem, said = "schema", str(error), ""
                continue
            found = piece_problem(
                self.piece.text,
                text,
                before=self.before,
                written=self.written,
                is_translated=is_translated,
            )
            if found is None:
                return text
            stage, problem, said = "coverage", found, text
        where = self.piece.text.strip()[:60]
        so_far = f"{self.written}\n{said}".strip()
        raise PieceError(stage, f"{problem} (piece {where!r})", so_far)

    async def _sample(self, sample: int) -> str:
        messages = self.prompt.messages(self.excerpt, self.written, self.piece.text)
        room = max(_ROOM * self.piece.num_tokens, _LEAST_ROOM)
        value = await self.model.value(
            messages, ANSWER, max_tokens=room, seed=self.seed, sample=sample
        )
        return str(value["rewrite"]).strip()
