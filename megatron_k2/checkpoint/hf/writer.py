"""Write a safetensors file tensor by tensor.

``safetensors.torch.save_file`` wants all tensors of a file at once; one layer of K2 in bf16 is
34 GB. The format allows better: header first, and the header needs only names, dtypes and shapes,
which the mapping knows beforehand. So memory is one tensor's.

Format (huggingface/safetensors README): 8 bytes little-endian header length, JSON header padded by
spaces to a multiple of 8, then the tensors' bytes without gaps, row-major.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from megatron_k2.checkpoint.block_fp8.layout import BLOCK
from megatron_k2.checkpoint.stream.output_file import OutputFile
from megatron_k2.checkpoint.stream.rows import Dtype, Rows

CHUNK_BYTES = 64 * 2**20
"""What a tensor is cut into on its way, in bytes of the side with the wider dtype."""


def row_chunks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """First and end row of the pieces a tensor [m, ...] is moved in; whole FP8 blocks of rows."""
    row_bytes = math.prod(shape[1:]) * itemsize
    step = max(BLOCK, CHUNK_BYTES // row_bytes // BLOCK * BLOCK)
    for top in range(0, shape[0], step):
        yield top, min(top + step, shape[0])


@dataclass(frozen=True)
class TensorSlot:
    """A tensor announced in the header."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def num_bytes(self) -> int:
        """Bytes it will take in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, slots: Sequence[TensorSlot], tensors: Iterable[Rows]) -> int:
    """Write ``path`` whole and flushed to the disk; the caller renames.

    Args:
        path: the file.
        slots: what is coming, in order.
        tensors: one per slot, consumed lazily; converted to the slot's dtype.

    Returns:
        Bytes of tensor data, ``total_size`` in the words of the index file.

    Raises:
        ValueError: if a tensor does not have the announced shape, or there are too few or many.
    """
    num_bytes = sum(slot.num_bytes for slot in slots)
    with OutputFile(path, num_bytes) as file:
        write_header(file, slots)
        for slot, tensor in zip(slots, tensors, strict=True):
            if tensor.shape != slot.shape:
                raise ValueError(
                    f"{slot.name}: got {list(tensor.shape)}, announced {list(slot.shape)}"
                )
            write_rows(file, tensor.to(slot.dtype))
        file.sync()
    return num_bytes


def write_header(file: IO[bytes], slots: Sequence[TensorSlot]) -> None:
    """Write the length and the JSON that precede the data of a safetensors file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for slot in slots:
        end = begin + slot.num_bytes
        entries[slot.name] = {
            "dtype": slot.dtype.safetensors_name,
            "shape": list(slot.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def write_rows(file: IO[bytes], rows: Rows) -> None:
    """Append the bytes of ``rows``, row-major."""
    file.write(rows.bits.reshape(-1).view(np.uint8).data)
