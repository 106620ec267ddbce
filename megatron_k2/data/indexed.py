"""Megatron's indexed dataset (``.bin`` + ``.idx``): read with numpy, written by Megatron's builder.

Reading needs no Megatron import (seconds); writing goes through ``IndexedDatasetBuilder`` so that
the format stays Megatron's own. ``.idx`` is a 34-byte header, then per sequence a length (int32)
and a byte offset (int64), then the document boundaries (int64, one more than there are documents).
"""

import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_k2.errors import UserError
from megatron_k2.files import commit_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in enumerate(
        ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1
    )
}
"""Megatron's ``DType`` codes."""


def bin_path(prefix: Path) -> Path:
    """``prefix.bin``, the file with the tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """``prefix.idx``: where sequences and documents begin."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's ``DType.optimal_dtype``: uint16 below 65,500 ids, int32 from there."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype
    num_sequences: int
    num_boundaries: int


def _read_header(prefix: Path) -> _Header:
    path = idx_path(prefix)
    try:
        with path.open("rb") as stream:
            raw = stream.read(_HEADER.size)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected an indexed dataset's prefix") from None
    if len(raw) < _HEADER.size or raw[:9] != _MAGIC:
        raise UserError(f"{path} is not a Megatron index; prepare the dataset again")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(raw)
    if version != 1 or code not in _DTYPES:
        raise UserError(f"{path}: version {version}, dtype code {code}; expected version 1")
    return _Header(_DTYPES[code], num_sequences, num_boundaries)


def check_indexed(prefix: Path) -> None:
    """Refuse a dataset that is absent, empty or not whole, by its sizes alone.

    Raises:
        UserError: naming the file, its size and the one expected.
    """
    index, tokens = idx_path(prefix), bin_path(prefix)
    for path in (index, tokens):
        if not path.is_file():
            raise UserError(
                f"data: {path} does not exist; prepare it with megatron-k2 data prepare, or "
                "name another with --train-data-path (in a recipe --set data.root=…)"
            )
    header = _read_header(prefix)
    count = header.num_sequences
    lengths_end = _HEADER.size + 4 * count
    size = lengths_end + 8 * count + 8 * header.num_boundaries
    if index.stat().st_size not in (size, size + count):  # with a mode a sequence: multimodal
        raise _cut(index, size)
    if count == 0:
        raise UserError(f"data: {index} holds no document; prepare it with some text")
    last = {}
    for dtype, end in (("<i4", lengths_end), ("<i8", lengths_end + 8 * count)):
        item = np.dtype(dtype)
        last[dtype] = int(np.fromfile(index, item, count=1, offset=end - item.itemsize)[0])
    num_bytes = last["<i8"] + last["<i4"] * header.dtype.itemsize
    if tokens.stat().st_size != num_bytes:
        raise _cut(tokens, num_bytes)


def _cut(path: Path, expected: int) -> UserError:
    actual = path.stat().st_size
    return UserError(
        f"data: {path} has {actual:,} bytes, expected {expected:,}: it was cut short, or belongs "
        "to another dataset; prepare or copy it again"
    )


def read_tokens(prefix: str | Path) -> np.ndarray:
    """All tokens of a split in order, EOD included, as a read-only memory map.

    Args:
        prefix: Path without ``.bin`` or ``.idx``.

    Returns:
        [num_tokens], uint16 or int32 as stored.
    """
    prefix = Path(prefix)
    header = _read_header(prefix)
    return np.memmap(bin_path(prefix), dtype=header.dtype, mode="r")


def read_sequence_lengths(prefix: str | Path) -> np.ndarray:
    """Tokens of each sequence, EOD included, [num_sequences] int32.

    A dataset written here has one sequence a document.
    """
    prefix = Path(prefix)
    count = _read_header(prefix).num_sequences
    return np.fromfile(idx_path(prefix), dtype=np.int32, count=count, offset=_HEADER.size)


def write_indexed(prefix: Path, documents: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Write documents, in order, one sequence each; both files appear whole, ``.idx`` last.

    Args:
        prefix: Path without ``.bin`` or ``.idx``.
        documents: Token ids of each document, EOD included, each [num_tokens].
        dtype: How tokens are stored, see ``token_dtype``.
    """
    with warnings.catch_warnings():
        # Megatron warns on import that Transformer Engine is absent; writing files needs none.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    partial = prefix.with_name(f".{prefix.name}.partial")
    builder = IndexedDatasetBuilder(str(bin_path(partial)), dtype=dtype.type)
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(idx_path(partial)))
    commit_file(bin_path(partial), bin_path(prefix))
    commit_file(idx_path(partial), idx_path(prefix))
