"""Which rows of a pack logits are made for: those that are asked for something.

Prompts, tools' results and padding are a large part of a pack and need none; a row of K2's logits
is 320 KiB in bf16. Where sequence parallelism has split the rows, the output layer gathers them and
wants as many from each tensor-parallel rank: one with fewer repeats a row, and what comes of that
is left out.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class AskedRows:
    """Rows of one context-parallel rank; tensors are int64 on the device of its model."""

    parts: Tensor
    """[P, m] rows within each part that the output layer gathers from, P: 1, or TP ranks with
    sequence parallelism."""
    rows: Tensor
    """[P m] rows of the s / CP in the order in which logits come out."""
    kept: Tensor
    """[n] places in ``rows`` that are asked for; the others are repetitions."""
    num_rows: int
    """s / CP."""

    def spread(self, values: Tensor) -> Tensor:
        """[..., P m] of each row of logits -> [..., s / CP], 0 in rows that are not asked for."""
        blank = values.new_zeros(*values.shape[:-1], self.num_rows)
        return blank.index_copy(-1, self.rows[self.kept], values[..., self.kept])


def asked_rows(is_asked: NDArray[np.bool_], num_parts: int, device: torch.device) -> AskedRows:
    """The rows of a context-parallel rank's share of a pack.

    Args:
        is_asked: [s / CP].
        num_parts: P, a divisor of s / CP.
        device: of the model.
    """
    size = len(is_asked) // num_parts
    each = [np.flatnonzero(part) for part in is_asked.reshape(num_parts, size)]
    longest = max(1, *(len(found) for found in each))
    parts = np.zeros((num_parts, longest), np.int64)
    is_kept = np.zeros((num_parts, longest), np.bool_)
    for number, found in enumerate(each):
        parts[number, : len(found)] = found
        is_kept[number, : len(found)] = True
    rows = parts + size * np.arange(num_parts)[:, None]
    return AskedRows(
        parts=torch.from_numpy(parts).to(device),
        rows=torch.from_numpy(rows.ravel()).to(device),
        kept=torch.from_numpy(np.flatnonzero(is_kept)).to(device),
        num_rows=len(is_asked),
    )
