"""Near duplicates by MinHash: which of many texts say the same in nearly the same words.

A text is the set of its runs of words; 128 smallest hashes estimate the Jaccard similarity of two
sets (Broder, 1997), and bands of them find candidates without comparing all pairs (Leskovec et
al., Mining of Massive Datasets, chapter 3). Candidates are compared by their whole signatures.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_k2.errors import UserError

NUM_HASHES = 128
RUN_WORDS = 5
"""Words of a run; texts under that are one run."""
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Words as runs are made of them: lower case, without marks."""
    return _WORD.findall(text.lower())


def runs(words: list[str], length: int) -> Iterator[str]:
    """Every run of so many words; the whole where there are fewer."""
    for start in range(max(len(words) - length + 1, 1)):
        yield " ".join(words[start : start + length])


_SEEDS = np.random.Generator(np.random.PCG64(0)).integers(
    0, 1 << 64, NUM_HASHES, dtype=np.uint64, endpoint=False
)
"""One of each function."""
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Of splitmix64's finaliser (Steele et al., 2014). ``a x + b`` of 32-bit numbers will not do: such
functions order the hashes too much alike, and near duplicates were missed."""


def signature(text: str, run_words: int = RUN_WORDS) -> np.ndarray:
    """The smallest hash of the text's runs under each function, [``NUM_HASHES``] uint64."""
    names = set(runs(words_of(text), run_words))
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest()) for n in names],
        dtype=np.uint64,
    )
    mixed = hashes[:, None] ^ _SEEDS
    for factor, shift in zip(_MIX, (30, 27), strict=True):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= factor
    mixed ^= mixed >> np.uint64(31)
    found: np.ndarray = mixed.min(axis=0)
    return found


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """The estimated Jaccard similarity of two texts' runs; its standard error is at most 0.045."""
    return float((one == other).mean())


def rows_of_a_band(threshold: float) -> int:
    """Rows so that pairs at the threshold are candidates with at least 95 %.

    With ``r`` rows in ``128 / r`` bands a pair of similarity s is one with 1 - (1 - s^r)^(128 / r).
    """
    fitting = [
        rows
        for rows in (1, 2, 4, 8, 16, 32)
        if 1 - (1 - threshold**rows) ** (NUM_HASHES // rows) >= 0.95
    ]
    return max(fitting, default=1)


@dataclass(frozen=True)
class Double:
    """A text that was left out."""

    of: str
    """The name of the one that stays."""
    similarity: float


class Deduplicator:
    """Texts one after another; each is new, or a near duplicate of one that came before.

    Args:
        threshold: similarity from which a text is a duplicate.

    Raises:
        UserError: a threshold outside 0 to 1.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        if not 0 < threshold <= 1:
            raise UserError(f"threshold {threshold:g}: expected more than 0, up to 1")
        self._threshold, self._rows = threshold, rows_of_a_band(threshold)
        self._kept: dict[str, np.ndarray] = {}
        self._bands: dict[tuple[int, bytes], list[str]] = defaultdict(list)

    def add(self, name: str, text: str) -> Double | None:
        """Keep it under its name; where it is a duplicate, say of what and keep nothing."""
        own = signature(text)
        bands = list(self._bands_of(own))
        seen: set[str] = set()
        best: Double | None = None
        for band in bands:
            for other in self._bands.get(band, ()):
                if other not in seen:
                    seen.add(other)
                    alike = similarity(own, self._kept[other])
                    if alike >= self._threshold and (best is None or alike > best.similarity):
                        best = Double(other, alike)
        if best is None:
            self._kept[name] = own
            for band in bands:
                self._bands[band].append(name)
        return best

    def _bands_of(self, own: np.ndarray) -> Iterator[tuple[int, bytes]]:
        for start in range(0, NUM_HASHES, self._rows):
            yield start, own[start : start + self._rows].tobytes()
