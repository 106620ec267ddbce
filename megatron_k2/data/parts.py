"""One part of a preparation: a run of input cut small, tokenized by a worker process, kept on disk.

The parts tile the input in order, so concatenating their tokens gives the same dataset however many
workers there were. A part is one ``.npz`` that appears under its final name only when complete:
that name is the whole record of progress.

Nothing here imports torch or Megatron; a worker starts in about a second.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_k2.data.indexed import token_dtype
from megatron_k2.data.sources import (
    Document,
    SourceFile,
    is_validation,
    read_json,
    read_text_file,
)
from megatron_k2.data.tokenizer import Tokenizer
from megatron_k2.files import write_atomically

SPLITS = ("train", "valid")
MIN_PART_BYTES, MAX_PART_BYTES = 1 << 20, 64 << 20
_PARTS_WANTED = 256


@dataclass(frozen=True)
class Span:
    """A whole file, or the lines of one that can be cut whose first byte lies in [start, end)."""

    file: SourceFile
    start: int
    end: int
    validation_fraction: float
    """Share of these documents that goes to ``valid``; 1 for an explicit validation input."""


@dataclass(frozen=True)
class Part:
    """A unit of work: consecutive spans."""

    index: int
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        """Input bytes: what progress is counted in."""
        return sum(span.end - span.start for span in self.spans)

    def path(self, directory: Path) -> Path:
        """The path of the finished part."""
        return directory / f"{self.index:06d}.npz"


@dataclass(frozen=True)
class PartContent:
    """A finished part, as read back."""

    tokens: dict[str, np.ndarray]
    """Split to ids of its documents one after another, EOD closing each."""
    lengths: dict[str, np.ndarray]
    """Split to tokens per document, int64."""
    num_empty_documents: int
    sha256: str
    """Over ids and texts of the documents read."""

    def documents(self, split: str) -> list[np.ndarray]:
        """Token ids of each document of a split, in input order."""
        return np.split(self.tokens[split], np.cumsum(self.lengths[split])[:-1])[
            : len(self.lengths[split])
        ]


def cut_into_parts(files: Sequence[tuple[SourceFile, float]], part_bytes: int) -> list[Part]:
    """Group files, and cut those that can be by bytes, into parts of about ``part_bytes``.

    Args:
        files: Each with its validation fraction.
        part_bytes: Target; a larger file that cannot be cut (a text, which is one document; an
            array; what is packed) is a part of its own.
    """
    parts: list[Part] = []
    pending: list[Span] = []
    pending_bytes = 0
    for file, fraction in files:
        step = part_bytes if file.can_be_cut else max(file.num_bytes, 1)
        for start in range(0, max(file.num_bytes, 1), step):
            end = min(start + step, file.num_bytes)
            pending.append(Span(file, start, end, fraction))
            pending_bytes += end - start
            if pending_bytes >= part_bytes:
                parts.append(Part(len(parts), tuple(pending)))
                pending, pending_bytes = [], 0
    if pending:
        parts.append(Part(len(parts), tuple(pending)))
    return parts


def default_part_bytes(total_bytes: int) -> int:
    """About 256 parts, none under 1 MiB or over 64 MiB: it does not depend on the machine."""
    return min(max(total_bytes // _PARTS_WANTED, MIN_PART_BYTES), MAX_PART_BYTES)


def read_documents(part: Part, json_key: str) -> Iterator[tuple[str, Document]]:
    """Every document of a part with the split it belongs to, empty ones included."""
    for span in part.spans:
        if span.file.is_json:
            documents = read_json(span.file, json_key, span.start, span.end)
        else:
            documents = iter((read_text_file(span.file),))
        for document in documents:
            valid = is_validation(document.id, span.validation_fraction)
            yield SPLITS[valid], document


def tokenize_part(part: Part, tokenizer: Tokenizer, json_key: str, directory: Path) -> int:
    """Tokenize a part and write its ``.npz``; returns its input bytes."""
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {split: [np.zeros(0, dtype)] for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    digest, num_empty = hashlib.sha256(), 0
    for split, document in read_documents(part, json_key):
        # A length before each field keeps ("ab", "c") apart from ("a", "bc").
        for field in (split, document.id, document.text):
            content = field.encode("utf-8", "surrogateescape")
            digest.update(len(content).to_bytes(8) + content)
        if not document.text:
            num_empty += 1
            continue
        ids = [*tokenizer.encode(document.text), tokenizer.eod_id]
        tokens[split].append(np.array(ids, dtype=dtype))
        lengths[split].append(len(ids))
    arrays: dict[str, np.ndarray] = {
        "num_empty": np.array(num_empty),
        "sha256": np.frombuffer(digest.digest(), dtype=np.uint8),
    }
    for split in SPLITS:
        arrays[f"{split}_tokens"] = np.concatenate(tokens[split])
        arrays[f"{split}_lengths"] = np.array(lengths[split], dtype=np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(part.path(directory), buffer.getvalue())
    return part.num_bytes


def read_part(part: Part, directory: Path, splits: Sequence[str] = SPLITS) -> PartContent:
    """Read a finished part: all lengths, and of the tokens only the ``splits`` asked for."""
    with np.load(part.path(directory), allow_pickle=False) as arrays:
        return PartContent(
            tokens={split: arrays[f"{split}_tokens"] for split in splits},
            lengths={split: arrays[f"{split}_lengths"] for split in SPLITS},
            num_empty_documents=int(arrays["num_empty"]),
            sha256=arrays["sha256"].tobytes().hex(),
        )
