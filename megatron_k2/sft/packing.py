"""Which samples share a sequence: bin packing of their lengths.

A sample of L tokens takes L - 1 positions (it trains L - 1 pairs of input and label), rounded up to
a multiple where a layout wants that. Best fit decreasing is the default: the longest first, each
into the fullest sequence that still holds it. Its proven bound is 11/9 of the optimum; on mixes of
dialogues it fills over 99 %.

The order of what comes out is by length, so whoever reads sequences shuffles them (``blend.py``).

Pure functions of lengths, the same on every machine.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from megatron_k2.errors import UserError

Method = Literal["best-fit", "first-fit", "none"]
METHODS: tuple[str, ...] = get_args(Method)
_WORD = 512
"""Bits of a word of ``_Spaces``: about the square root of a long sequence."""


@dataclass(frozen=True)
class Packs:
    """Sequences as lists of samples."""

    samples: np.ndarray
    """[num_samples] int64: numbers of samples, sequence after sequence."""
    offsets: np.ndarray
    """[num_packs + 1] int64: where in ``samples`` each sequence begins."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.samples[self.offsets[index] : self.offsets[index + 1]]


def positions_of(lengths: np.ndarray, multiple: int = 1) -> np.ndarray:
    """Positions each sample takes in a sequence.

    Args:
        lengths: Tokens of each sample, [n].
        multiple: What a document's positions are padded to, 2 x the context-parallel size.
    """
    pairs = np.asarray(lengths, dtype=np.int64) - 1
    return -(-pairs // multiple) * multiple


def fill_of(packs: Packs, lengths: np.ndarray, capacity: int) -> float:
    """Share of positions that hold a token; 0 where there is no sequence."""
    used = int((np.asarray(lengths, dtype=np.int64)[packs.samples] - 1).sum())
    return used / (len(packs) * capacity) if len(packs) else 0.0


def pack(
    lengths: np.ndarray, capacity: int, *, multiple: int = 1, method: Method = "best-fit"
) -> Packs:
    """Put every sample into a sequence.

    Args:
        lengths: Tokens of each sample, [n], each at least 2.
        capacity: Positions of a sequence.
        multiple: See ``positions_of``; it divides ``capacity``.
        method: ``best-fit`` (decreasing), ``first-fit`` (in the order given, into the first
            sequence that holds it), ``none`` (one sample a sequence).

    Raises:
        UserError: a sample is longer than a sequence or has nothing to predict.
    """
    if method not in METHODS:
        raise UserError(f"packing {method!r}: expected one of {', '.join(METHODS)}")
    if capacity < 1 or multiple < 1 or capacity % multiple:
        raise UserError(
            f"sequence length {capacity}: expected a positive multiple of {multiple}, which each "
            "document is padded to"
        )
    sizes = positions_of(lengths, multiple)
    if len(sizes) and sizes.min() < 1:
        raise UserError("a sample of one token has nothing to predict; leave it out")
    if len(sizes) and sizes.max() > capacity:
        raise UserError(
            f"{int((sizes > capacity).sum()):,} of {len(sizes):,} samples are longer than "
            f"{capacity:,} positions (the longest: {int(sizes.max()):,}); prepare the set for this "
            "sequence length, with --too-long drop or truncate"
        )
    if method == "none":
        return Packs(np.arange(len(sizes)), np.arange(len(sizes) + 1))
    if method == "first-fit":
        return _grouped(_first_fit(sizes, capacity))
    return _best_fit(sizes, capacity)


def _grouped(pack_of: np.ndarray) -> Packs:
    """From the sequence of each sample; samples of one keep their order."""
    counts = np.bincount(pack_of) if len(pack_of) else np.zeros(0, dtype=np.int64)
    return Packs(np.argsort(pack_of, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))


class _Spaces:
    """A set of integers with the smallest member that is at least some value, in two looks.

    Bits in words of ``_WORD``, and a bit for each word that has one.
    """

    def __init__(self, largest: int) -> None:
        self._words = [0] * (largest // _WORD + 1)
        self._filled = 0

    def add(self, value: int) -> None:
        word, bit = divmod(value, _WORD)
        self._words[word] |= 1 << bit
        self._filled |= 1 << word

    def remove(self, value: int) -> None:
        word, bit = divmod(value, _WORD)
        self._words[word] ^= 1 << bit
        if not self._words[word]:
            self._filled ^= 1 << word

    def at_least(self, value: int) -> int:
        """The smallest member not under ``value``; -1 if there is none."""
        word, bit = divmod(value, _WORD)
        if above := self._words[word] >> bit:
            return value + (above & -above).bit_length() - 1
        if not (later := self._filled >> (word + 1)):
            return -1
        word += (later & -later).bit_length()
        bits = self._words[word]
        return word * _WORD + (bits & -bits).bit_length() - 1


def _best_fit(sizes: np.ndarray, capacity: int) -> Packs:
    """Best fit decreasing; samples of one size are placed together.

    A sequence that takes one sample of a size stays the fullest that holds the next, so it takes as
    many as go in: the loop turns once for each size and sequence, not for each sample.
    """
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    pack_of = np.empty(len(sizes), dtype=np.int64)
    open_packs: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces, num_packs, placed = _Spaces(capacity), 0, 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            space = spaces.at_least(size)
            if space < 0:
                space, index = capacity, num_packs
                num_packs += 1
            else:
                index = open_packs[space].pop()
                if not open_packs[space]:
                    spaces.remove(space)
            taken = min(left, space // size)
            begin = placed + count - left
            pack_of[order[begin : begin + taken]] = index
            left -= taken
            space -= taken * size
            if space:
                if not open_packs[space]:
                    spaces.add(space)
                open_packs[space].append(index)
        placed += count
    return _grouped(pack_of)


def _first_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Sequence of each sample; a tree over sequences holds the largest space of each half."""
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    tree = [capacity] * (2 * leaves)
    found = np.empty(len(sizes), dtype=np.int64)
    for number, size in enumerate(sizes.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            node += tree[node] < size
        found[number] = node - leaves
        tree[node] -= size
        while node > 1:
            node //= 2
            left, right = tree[2 * node], tree[2 * node + 1]
            largest = left if left > right else right
            if tree[node] == largest:
                break
            tree[node] = largest
    return found
