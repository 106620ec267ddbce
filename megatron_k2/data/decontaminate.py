"""Evaluation texts kept out of training texts: no run of 13 words of the one stands in the other.

Thirteen is GPT-3's length (Brown et al., 2020, appendix C). Runs are compared by 64-bit hashes. A
test text of fewer words is looked for whole, from ``LEAST_WORDS`` on; what is shorter still would
be met everywhere, and is counted and not looked for.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_k2.data.dedup import runs, words_of
from megatron_k2.errors import UserError

NGRAM = 13
LEAST_WORDS = 6
"""Ours."""


def _hash(run: str) -> int:
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest())


@dataclass
class Evaluations:
    """What must not be met.

    Raises:
        UserError: a length of runs under ``LEAST_WORDS``.
    """

    ngram: int = NGRAM
    num_texts: int = 0
    num_too_short: int = 0
    _by_length: dict[int, dict[int, str]] = field(default_factory=dict)
    """Words of a run to hashes of such runs, each with the name of its text."""

    def __post_init__(self) -> None:
        if self.ngram < LEAST_WORDS:
            raise UserError(f"--ngram {self.ngram}: expected {LEAST_WORDS} or more")

    def add(self, name: str, text: str) -> None:
        """One evaluation text."""
        words = words_of(text)
        if len(words) < LEAST_WORDS:
            self.num_too_short += 1
            return
        self.num_texts += 1
        length = min(self.ngram, len(words))
        known = self._by_length.setdefault(length, {})
        for run in runs(words, length):
            known.setdefault(_hash(run), name)

    def met_in(self, text: str) -> tuple[str, str] | None:
        """The name of an evaluation text and the run of it that a training text has."""
        words = words_of(text)
        for length, known in self._by_length.items():
            if len(words) < length:
                continue
            for run in runs(words, length):
                if (name := known.get(_hash(run))) is not None:
                    return name, run
        return None


def evaluations(texts: Iterable[tuple[str, str]], ngram: int = NGRAM) -> Evaluations:
    """Of names and texts.

    Raises:
        UserError: a length that is too small.
    """
    found = Evaluations(ngram)
    for name, text in texts:
        found.add(name, text)
    return found
