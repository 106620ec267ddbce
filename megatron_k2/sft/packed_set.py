"""Sequences to train on, read from disk: packed dialogues, and pretraining text beside them.

Tokens of a sample lie on disk once, and a sequence is a list of samples, so another sequence length
or layout packs the same files anew. Everything is memory-mapped, needs no torch, and gives the same
answer on every rank.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_k2.data.content import content_hash
from megatron_k2.data.indexed import check_indexed, read_sequence_lengths, read_tokens
from megatron_k2.data.manifest import TokenizerRecord
from megatron_k2.data.manifest import read_manifest as read_text_manifest
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.sft.manifest import ARRAYS, packs_file, read_manifest
from megatron_k2.sft.packing import Method, Packs, fill_of, pack


@dataclass(frozen=True)
class PackedSequence:
    """Documents one after another, neither shifted nor padded.

    Of a document of L tokens, the first L - 1 are inputs and the last L - 1 are labels.
    """

    tokens: np.ndarray
    """[t] int32."""
    loss_mask: np.ndarray
    """[t] uint8: 1 where the token at the same place is a target. A document's first one never is
    predicted, whatever stands here."""
    lengths: np.ndarray
    """[d] int64: tokens of each document; they sum to t, and each is at least 2."""
    weights: np.ndarray
    """[d] float32: by which each document's loss is multiplied."""


class Sequences(Protocol):
    """What training reads from."""

    tokenizer: TokenizerRecord

    @property
    def content_hash(self) -> str:
        """Of the tokens, the masks, and how they are packed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> PackedSequence: ...


class PackedSet:
    """A set that ``megatron-k2 data chat`` prepared.

    Args:
        directory: Holds ``chat.json``.
        split: ``train`` or ``valid``.
        capacity: Positions of a sequence.
        multiple: To which a document's positions are padded (by the reader).
        method: How samples are packed.

    Raises:
        UserError: not a whole set, no such split, or a sample that is longer than a sequence.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str = "train",
        *,
        capacity: int,
        multiple: int = 1,
        method: Method = "best-fit",
    ) -> None:
        directory = Path(directory)
        self.manifest = read_manifest(directory)
        if split not in self.manifest.splits:
            splits = ", ".join(self.manifest.splits)
            raise UserError(f"{directory} has no split {split!r}; it has {splits}")
        self.tokenizer = self.manifest.tokenizer
        self.capacity, self.multiple, self.method = capacity, multiple, method
        self._split = split
        arrays = {
            name: np.load(directory / f"{split}.{name}.npy", mmap_mode="r") for name in ARRAYS
        }
        self._tokens, self._mask = arrays["tokens"], arrays["mask"]
        self._offsets, self._weights = arrays["offsets"], arrays["weights"]
        self._packs = self._find_packs(directory)

    def _find_packs(self, directory: Path) -> Packs:
        name = packs_file(self._split, self.capacity, self.multiple, self.method)
        if name in self.manifest.splits[self._split].file_bytes:
            with np.load(directory / name, allow_pickle=False) as found:
                return Packs(found["samples"], found["offsets"])
        try:
            return pack(self.lengths, self.capacity, multiple=self.multiple, method=self.method)
        except UserError as problem:
            raise UserError(f"{directory}: {problem}") from None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, [num_samples] int64."""
        return np.diff(self._offsets)

    @property
    def fill(self) -> float:
        """Share of positions that hold a token."""
        return fill_of(self._packs, self.lengths, self.capacity)

    @property
    def content_hash(self) -> str:
        """See ``Sequences``."""
        packing = [self._split, self.capacity, self.multiple, self.method]
        return sha256_of_json(
            [self.manifest.source.content_sha256, self.manifest.plan_sha256, packing]
        )

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> PackedSequence:
        samples = self._packs[index]
        begins, ends = self._offsets[samples], self._offsets[samples + 1]
        spans = [
            slice(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
        return PackedSequence(
            tokens=np.concatenate([self._tokens[span] for span in spans]).astype(np.int32),
            loss_mask=np.concatenate([self._mask[span] for span in spans]),
            lengths=ends - begins,
            weights=np.asarray(self._weights[samples]),
        )


class PretrainText:
    """A set that ``megatron-k2 data prepare`` made, as sequences beside dialogues.

    A document longer than a sequence is cut so that every token but its first is predicted once;
    pieces are packed as dialogues are. All tokens are targets.

    Args:
        directory: Holds ``dataset.json``.
        split: ``train`` or ``valid``.
        capacity: Positions of a sequence.
        multiple: To which a piece's positions are padded (by the reader).

    Raises:
        UserError: not a whole dataset, or no such split.
    """

    def __init__(
        self, directory: str | Path, split: str = "train", *, capacity: int, multiple: int = 1
    ) -> None:
        directory = Path(directory)
        manifest = read_text_manifest(directory)
        if split not in manifest.splits:
            splits = ", ".join(manifest.splits)
            raise UserError(f"{directory} has no split {split!r}; it has {splits}")
        self.tokenizer = manifest.tokenizer
        self._prefix = directory / manifest.splits[split].prefix
        self._packing = [split, capacity, multiple]
        check_indexed(self._prefix)
        self._tokens = read_tokens(self._prefix)
        self._begins, self._lengths = cut_documents(read_sequence_lengths(self._prefix), capacity)
        self._packs = pack(self._lengths, capacity, multiple=multiple)

    @property
    def content_hash(self) -> str:
        """See ``Sequences``."""
        return sha256_of_json([content_hash(str(self._prefix)), self._packing])

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> PackedSequence:
        pieces = self._packs[index]
        begins, lengths = self._begins[pieces], self._lengths[pieces]
        pairs = zip(begins.tolist(), (begins + lengths).tolist(), strict=True)
        tokens = np.concatenate([self._tokens[begin:end] for begin, end in pairs])
        return PackedSequence(
            tokens=tokens.astype(np.int32),
            loss_mask=np.ones(len(tokens), dtype=np.uint8),
            lengths=lengths,
            weights=np.ones(len(pieces), dtype=np.float32),
        )


def cut_documents(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of documents: first token of each in the whole, and its tokens.

    A piece has at most ``capacity`` positions, and begins with the last token of the one before.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    lengths, starts = lengths[lengths > 1], (np.cumsum(lengths) - lengths)[lengths > 1]
    counts = -(-(lengths - 1) // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    piece = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = piece * capacity
    pieces = np.minimum(capacity + 1, lengths[document] - begins)
    return starts[document] + begins, pieces
