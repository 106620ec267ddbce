"""Documents laid end to end in one row of a batch: where each lies, and which rows are padding.

A *pack* has ``s`` rows. Each document takes as many as it has tokens to read, and with context
parallelism padding up to a multiple of ``2 CP``: it is then cut into ``2 CP`` equal chunks of which
rank r holds r and 2 CP − 1 − r (Megatron's zigzag, document by document). Rows that no document
takes are padding too, a last document without tokens.

A document may go on from another of its pack, as every answer of a group goes on from one prompt:
its positions begin behind that one's tokens, and it attends to them as if they stood before it.
They are computed once, and so is their share of the gradient. Not with context parallelism.

Everything here is arithmetic on the host; ``model/padding_rows.py`` keeps padding at zero in the
network, ``model/attention.py`` and Transformer Engine attend by what is written here.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

PADDING_POSITION = -1
"""Position of a row that belongs to no document's tokens."""


@dataclass(frozen=True)
class PackLayout:
    """Where the documents of one pack lie, in rows of the whole pack."""

    lengths: tuple[int, ...]
    """Tokens of each document; 0 for rows that are all padding."""
    bounds: tuple[int, ...]
    """First row of each document, and the number of rows; one more than ``lengths``."""
    beginnings: tuple[int, ...] = ()
    """The document, before it in the pack, that each goes on from; -1 for one that stands alone.
    Empty where all do."""

    @property
    def first_positions(self) -> tuple[int, ...]:
        """Position of each document's first token."""
        if not self.beginnings:
            return (0,) * len(self.lengths)
        return tuple(0 if at < 0 else self.lengths[at] for at in self.beginnings)

    @property
    def num_rows(self) -> int:
        """The pack's s, padding included."""
        return self.bounds[-1]

    @property
    def longest(self) -> int:
        """Rows of the longest document, its padding and what it goes on from included."""
        spans = zip(self.first_positions, itertools.pairwise(self.bounds), strict=True)
        return max(first + end - start for first, (start, end) in spans)

    @property
    def has_padding(self) -> bool:
        """Whether any row is padding."""
        return sum(self.lengths) < self.num_rows

    def positions(self) -> NDArray[np.int64]:
        """Position of each row within its document, ``PADDING_POSITION`` in padding; [s]."""
        found = np.full(self.num_rows, PADDING_POSITION, np.int64)
        firsts = self.first_positions
        for start, length, first in zip(self.bounds, self.lengths, firsts, strict=False):
            found[start : start + length] = np.arange(first, first + length)
        return found

    def key_spans(self) -> list[tuple[int, int]]:
        """Rows of the keys that documents see, in turn: what each goes on from, then its own."""
        found = []
        for number, span in enumerate(itertools.pairwise(self.bounds)):
            at = self.beginnings[number] if self.beginnings else -1
            if at >= 0:
                found.append((self.bounds[at], self.bounds[at] + self.lengths[at]))
            found.append(span)
        return found

    def rows_of_rank(self, cp_size: int, cp_rank: int) -> NDArray[np.int64]:
        """Rows that a context-parallel rank holds, in its order; [s / CP].

        The same as Transformer Engine's ``thd_get_partitioned_indices``, which needs CUDA.
        """
        if cp_size == 1:
            return np.arange(self.num_rows)
        parts = []
        for start, end in itertools.pairwise(self.bounds):
            chunk = (end - start) // (2 * cp_size)
            for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
                parts.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
        return np.concatenate(parts)


def lay_out(
    lengths: Sequence[int], num_rows: int, multiple: int = 1, beginnings: Sequence[int] = ()
) -> PackLayout:
    """Documents one after another, each padded to a multiple, the rest of the pack behind them.

    Args:
        lengths: tokens that each document reads, at least 1.
        num_rows: s, itself a multiple.
        multiple: of rows, for every document: 2 CP where the sequence is split.
        beginnings: what each goes on from, see ``PackLayout``; of documents that stand alone.

    Raises:
        ValueError: where they do not fit; the packing was made for another size. A beginning that
            itself goes on from another, or one with a multiple.
    """
    if any(at >= 0 for at in beginnings):
        is_wrong = any(
            at >= n or (at >= 0 and beginnings[at] >= 0) for n, at in enumerate(beginnings)
        )
        if multiple > 1 or is_wrong or len(beginnings) != len(lengths):
            raise ValueError(
                f"beginnings {list(beginnings)} of {len(lengths)} documents in multiples of "
                f"{multiple}: expected earlier documents that stand alone, and multiples of 1"
            )
    else:
        beginnings = ()
    starts = [0, *itertools.accumulate(-(-length // multiple) * multiple for length in lengths)]
    if starts[-1] > num_rows or num_rows % multiple:
        raise ValueError(
            f"{len(lengths)} documents take {starts[-1]} rows in multiples of {multiple}, the pack "
            f"has {num_rows}"
        )
    if starts[-1] == num_rows:
        return PackLayout(tuple(lengths), tuple(starts), tuple(beginnings))
    alone = (-1,) if beginnings else ()
    return PackLayout((*lengths, 0), (*starts, num_rows), (*beginnings, *alone))


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's description of a pack, with what is known on the host, for one rank.

    ``cu_seqlens`` are the layout's bounds: to Transformer Engine a document's padding is part of
    it, behind its tokens, where no token sees it; its rows are zero, so that their logits are 0.
    """

    layout: PackLayout | None = None
    is_padding: Tensor | None = None
    """Bool [s / CP] on the device: this rank's rows of padding; ``None`` where there are none."""
    positions: Tensor | None = None
    """[s] int64 on the device, of each row within its document, 0 in padding; ``None`` where every
    document begins at 0, as Megatron's rotary embedding takes it."""
    loss_weight: Tensor | None = None
    """Sum of the loss mask over this rank's rows, 0-d fp32, for multi-token prediction."""


def describe(
    layout: PackLayout, rows: NDArray[np.int64], device: torch.device | str
) -> PackedDocuments:
    """What every layer of this rank needs to know of a pack.

    Args:
        layout: of the whole pack.
        rows: of them those of this rank, ``layout.rows_of_rank``.
        device: of the tensors.
    """
    bounds = torch.tensor(layout.bounds, dtype=torch.int32).to(device, non_blocking=True)
    positions = layout.positions()
    padding = positions[rows] == PADDING_POSITION
    begun = torch.from_numpy(positions.clip(0)).to(device) if layout.beginnings else None
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=layout.longest,
        max_seqlen_kv=layout.longest,
        layout=layout,
        is_padding=torch.from_numpy(padding).to(device) if padding.any() else None,
        positions=begun,
    )


class GatherRows(torch.autograd.Function):
    """All-gather of rows over a group into natural order; backward sums and takes one's own.

    Forward: [b, h, s / CP, d] on each rank of the group -> [b, h, s, d] on every rank.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, group: dist.ProcessGroup, layout: PackLayout
    ) -> Tensor:
        """See the class."""
        ctx.group, ctx.layout = group, layout
        return gathered(x, 2, group, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        rows = ctx.layout.rows_of_rank(ctx.group.size(), ctx.group.rank())
        return grad.index_select(2, torch.from_numpy(rows).to(grad.device)), None, None


class SeenRows(torch.autograd.Function):
    """Rows of keys or values as documents see them; backward sums over those that see a row.

    Forward: [b, h, s, d] -> [b, h, rows of ``layout.key_spans()``, d].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PackLayout) -> Tensor:  # type: ignore[override]
        """See the class."""
        ctx.spans, ctx.shape = layout.key_spans(), x.shape
        return torch.cat([x[:, :, start:end] for start, end in ctx.spans], 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """See the class; in one order, so that the bits are the same each time."""
        found, at = grads[0].new_zeros(ctx.shape), 0
        for start, end in ctx.spans:
            found[:, :, start:end] += grads[0][:, :, at : at + end - start]
            at += end - start
        return found, None


def gathered(x: Tensor, dim: int, group: dist.ProcessGroup, layout: PackLayout) -> Tensor:
    """Rows of all context-parallel ranks in the pack's order, along ``dim``."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    rows = [layout.rows_of_rank(group.size(), rank) for rank in range(group.size())]
    order = torch.from_numpy(np.argsort(np.concatenate(rows))).to(x.device)
    return torch.cat(parts, dim).index_select(dim, order)


def next_in_document(
    x: Tensor, packed: PackedDocuments, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Each token's successor within its document, 0 behind a document's last; padding as it is.

    Args:
        x: [..., s / CP], one value a row.
        packed: the pack that ``x`` belongs to.
        group: context-parallel; one collective where it has more than one rank.
    """
    layout = packed.layout
    assert layout is not None  # ``describe`` gives one
    is_split = group is not None and group.size() > 1
    whole = gathered(x, x.dim() - 1, group, layout) if is_split else x  # type: ignore[arg-type]
    positions = layout.positions()
    last = [s + n - 1 for s, n in zip(layout.bounds, layout.lengths, strict=False) if n]
    rolled = torch.where(
        torch.from_numpy(positions == PADDING_POSITION).to(x.device), whole, whole.roll(-1, -1)
    )
    rolled[..., last] = 0
    if not is_split:
        return rolled
    rows = layout.rows_of_rank(group.size(), group.rank())  # type: ignore[union-attr]
    return rolled[..., torch.from_numpy(rows).to(x.device)]
