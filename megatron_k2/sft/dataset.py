"""Packs of documents as Megatron's data loader takes them: one row of a batch each.

Labels are shifted within a document: a document of n tokens is n − 1 rows, which read its tokens
but the last and are asked for those but the first. No row is asked for another document's token.

The loss of a row is weighted by what stands in ``loss_mask``: per token, its sample's weight where
the token is a target; per sample, that over the sample's number of targets.
"""

from dataclasses import dataclass
from typing import Protocol, override

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_k2.model.packed import lay_out

LOSSES = ("token", "sample")
"""``--sft-loss``: the mean over the targets of a global batch, or over its samples."""


class Pack(Protocol):
    """What ``packed_set.PackedSequence`` gives: documents one after another, unshifted."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[tokens of all documents]."""

    @property
    def loss_mask(self) -> NDArray[np.uint8]:
        """1 where the token itself is a target; of ``tokens``' length."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, at least 2."""

    @property
    def weights(self) -> NDArray[np.float32]:
        """Of each document."""


class Packs(Protocol):
    """A sequence of packs, the same on every rank."""

    def __len__(self) -> int:
        """Number of packs."""

    def __getitem__(self, index: int, /) -> Pack:
        """The pack."""


@dataclass(frozen=True)
class PackShape:
    """How packs become rows."""

    num_rows: int
    """s, rows of a pack: ``--seq-length``."""
    multiple: int = 1
    """Rows of a document are a multiple of it: 2 CP where sequences are split."""
    loss: str = "token"
    """One of ``LOSSES``."""


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packs as tensors, in the packs' own order."""

    def __init__(self, packs: Packs, shape: PackShape) -> None:
        self._packs, self._shape = packs, shape

    def __len__(self) -> int:
        return len(self._packs)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``rows_of`` the pack."""
        return rows_of(self._packs[int(index)], self._shape)


def rows_of(pack: Pack, shape: PackShape) -> dict[str, Tensor]:
    """One pack as rows.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` int64 [s] and ``loss_mask`` float32 [s], 0, 0, −1
        and 0 in padding; ``cu_seqlens`` int32 [documents + 1], first rows of the documents and the
        end; ``lengths`` int64 [documents], their rows of tokens; ``max_seqlen`` int32, the longest
        with its padding; ``num_samples`` int64, those with a target. Rows behind the last document
        are a document of length 0.

    Raises:
        ValueError: where the documents do not fit.
    """
    layout = lay_out([int(length) - 1 for length in pack.lengths], shape.num_rows, shape.multiple)
    rows = {name: np.zeros(shape.num_rows, np.int64) for name in ("tokens", "labels")}
    loss_mask = np.zeros(shape.num_rows, np.float32)
    num_samples, first = 0, 0
    for start, length, weight in zip(
        layout.bounds, map(int, pack.lengths), pack.weights, strict=False
    ):
        tokens = pack.tokens[first : first + length]
        targets = pack.loss_mask[first + 1 : first + length].astype(np.float32)
        here = slice(start, start + length - 1)
        rows["tokens"][here], rows["labels"][here] = tokens[:-1], tokens[1:]
        num_targets = targets.sum()
        if num_targets:
            num_samples += 1
            each = weight / num_targets if shape.loss == "sample" else weight
            loss_mask[here] = targets * each
        first += length
    return {
        **{name: torch.from_numpy(row) for name, row in rows.items()},
        "loss_mask": torch.from_numpy(loss_mask),
        "position_ids": torch.from_numpy(layout.positions()),
        "cu_seqlens": torch.tensor(layout.bounds, dtype=torch.int32),
        "lengths": torch.tensor(layout.lengths),
        "max_seqlen": torch.tensor(layout.longest, dtype=torch.int32),
        "num_samples": torch.tensor(num_samples),
    }
