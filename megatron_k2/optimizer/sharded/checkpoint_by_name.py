"""Optimizer state in a checkpoint by parameter name: any layout writes it, any layout reads it.

Upstream's formats for ``DistributedOptimizer`` either follow its buckets (``dp_reshardable``) or
gather everything to one rank (``fully_reshardable``, which in 0.19.2 writes shifted values when
buckets are padded), and both number the chained optimizers, so that EP=1 and EP>1 cannot read each
other. Here a rank's flat piece of a parameter is described as what it is: at most three rectangles
of the parameter (the end of a row, whole rows, the beginning of a row), each a ``ShardedTensor``
with its offset in the global tensor. Nothing is gathered, nothing is padded, and there is no zero
``exp_avg_sq`` for Muon's matrices. Keys are those of Megatron's unsharded optimizers:
``optimizer.state.<state>.<parameter>``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangle of a row-major matrix, and where it lies in a flat piece of it."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    flat: tuple[int, int]
    """[start, end) counted from the beginning of the piece."""

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, cols] of the rectangle."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]


def flat_boxes(num_cols: int, start: int, end: int) -> list[Box]:
    """Rectangles that elements [start, end) of a row-major [*, num_cols] matrix make up."""
    boxes, position = [], start
    while position < end:
        row, col = divmod(position, num_cols)
        if col or end - position < num_cols:
            stop = min(end, (row + 1) * num_cols)
            rows, cols = (row, row + 1), (col, col + stop - position)
        else:
            last = end // num_cols
            stop = last * num_cols
            rows, cols = (row, last), (0, num_cols)
        boxes.append(Box(rows, cols, (position - start, stop - start)))
        position = stop
    return boxes


def _leaves(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[int, ShardedTensor]]:
    """(first row in the parameter, description) of each part: gate and up, or the whole."""
    if isinstance(entry, ShardedTensor):
        yield 0, entry
        return
    built = entry.build()
    parts = built.values() if isinstance(built, dict) else built
    row = 0
    for part in parts:
        yield row, part
        row += part.local_shape[0]
    if row != entry.data.shape[0]:
        raise ValueError(
            f"{entry.key}: its parts have {row} rows of {entry.data.shape[0]}; only splits along "
            "the rows can be saved from flat shards"
        )


def sharded_pieces(
    entry: ShardedTensor | ShardedTensorFactory,
    shape: torch.Size,
    piece: tuple[int, int],
    flat: Tensor,
    state: str,
) -> list[ShardedTensor]:
    """Describe a flat piece of a parameter's optimizer state.

    Args:
        entry: the model's own description of the parameter on this rank.
        shape: of the parameter on this rank, one or two dimensions.
        piece: [start, end) of the flattened parameter that this rank's shard holds.
        flat: that shard's values, [end - start]; the results are views of it.
        state: name of the state, such as ``momentum_buffer``.
    """
    num_cols = shape[-1] if len(shape) == 2 else 1
    start, end = piece
    found = []
    for first_row, leaf in _leaves(entry):
        num_rows = leaf.local_shape[0]
        low = max(start, first_row * num_cols)
        high = min(end, (first_row + num_rows) * num_cols)
        if low >= high:
            continue
        for box in flat_boxes(num_cols, low - first_row * num_cols, high - first_row * num_cols):
            values = flat[low - start + box.flat[0] : low - start + box.flat[1]]
            found.append(_sharded(leaf, box, values, state, is_matrix=len(shape) == 2))
    return found


def _sharded(
    leaf: ShardedTensor, box: Box, values: Tensor, state: str, *, is_matrix: bool
) -> ShardedTensor:
    prepended = leaf.prepend_axis_num
    local = box.shape if is_matrix else box.shape[:1]
    offset = list(leaf.global_offset)
    offset[prepended] += box.rows[0]
    if is_matrix:
        offset[prepended + 1] += box.cols[0]
    view = values.view((1,) * prepended + local)
    return ShardedTensor(
        key=f"optimizer.state.{state}.{leaf.key}",
        data=view,
        dtype=view.dtype,
        local_shape=tuple(view.shape),
        global_shape=leaf.global_shape,
        global_offset=tuple(offset),
        axis_fragmentations=None,  # an irregular grid: coverage is checked by torch's planner
        replica_id=_unique_in_data_parallel(leaf),
        allow_shape_mismatch=leaf.allow_shape_mismatch,
    )


def _unique_in_data_parallel(leaf: ShardedTensor) -> tuple[int, ...]:
    """Each data-parallel rank holds another piece; only tensor-parallel copies are replicas."""
    replica = leaf.replica_id
    return (*replica[:-1], 0) if isinstance(replica, tuple) else (0,)


def sharded_scalars(
    entry: ShardedTensor | ShardedTensorFactory, values: Tensor, state: str, data_rank: int
) -> ShardedTensor:
    """Describe one value a whole matrix of the parameter ([1], or [2] for gate and up).

    Every rank that holds a part of the parameter has the same values.
    """
    _, leaf = next(iter(_leaves(entry)))
    prepended = leaf.prepend_axis_num
    shape = (*leaf.global_shape[:prepended], values.numel())
    view = values.view((1,) * prepended + (values.numel(),))
    return ShardedTensor(
        key=f"optimizer.state.{state}.{leaf.key}",
        data=view,
        dtype=view.dtype,
        local_shape=tuple(view.shape),
        global_shape=shape,
        global_offset=(*leaf.global_offset[:prepended], 0),
        axis_fragmentations=None,
        replica_id=(0, _split_rank(leaf), data_rank),
    )


def _split_rank(leaf: ShardedTensor) -> int:
    """Non-zero on all but one of the ranks that hold parts of the same matrix."""
    replica = leaf.replica_id
    copies = sum(replica[:-1]) if isinstance(replica, tuple) else 0
    return copies + sum(leaf.global_offset[leaf.prepend_axis_num :])
