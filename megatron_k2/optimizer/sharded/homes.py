"""Who orthogonalises which matrix: every one exactly once in the world, at its home.

Pure arithmetic on shapes, without torch: every rank computes the same assignment without talking.

ZeRO-1 leaves each data-parallel rank a contiguous piece of the flat parameters, cut anywhere; a
tensor-parallel matrix is split once more. Newton-Schulz needs the whole matrix, so each has a home
among the ranks that hold its parts: its *group*, tensor x data x context parallel for dense
parameters, expert-tensor x expert-data parallel for experts. Homes are chosen by the longest
processing time first, by the FLOPs that are executed, except that a matrix which lies whole on one
rank stays there while that costs no balance: then nothing is sent at all.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

BALANCE_SLACK = 1.05
"""A matrix stays where it lies while that rank's load is below this times the mean."""


@dataclass(frozen=True)
class Placement:
    """One Muon matrix of a group of ranks: its size, and who holds which part."""

    name: str
    """Its parameter's; gate and up of a fused weight, or its heads, share it."""
    shape: tuple[int, int]
    """[rows, cols] of the whole matrix."""
    pieces: tuple[tuple[int, int], ...]
    """[start, end) of its flat tensor-parallel shard, a data-parallel rank each; (0, 0) if none."""
    partition_dim: int
    """Dimension split over the tensor-parallel ranks; -1: each of them that has it has all."""
    bucket: int
    """Matrices of one bucket are exchanged together."""
    tensor_rank: int | None = None
    """The only tensor-parallel rank that has it (a head); None: all have it, or a part."""
    is_data_replicated: bool = False
    """Every data-parallel rank holds the whole shard (no ZeRO): one copy is sent, all get the
    result."""


@dataclass(frozen=True)
class RankGrid:
    """The ranks that share matrices: ``data_ranks`` x ``tensor_ranks``, tensor fastest."""

    tensor_ranks: int
    data_ranks: int

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return self.tensor_ranks * self.data_ranks

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(data rank, tensor rank) of a rank of the group."""
        return divmod(rank, self.tensor_ranks)

    def rank(self, data_rank: int, tensor_rank: int) -> int:
        """The rank in the group that has these coordinates."""
        return data_rank * self.tensor_ranks + tensor_rank


@dataclass(frozen=True)
class Assignment:
    """Home of each placement, in the placements' order, and what each rank will execute."""

    homes: tuple[int, ...]
    loads: tuple[int, ...]
    """FLOPs of Newton-Schulz a rank, the seed included."""

    @property
    def imbalance(self) -> float:
        """Largest load over the mean; 1 is perfect."""
        mean = sum(self.loads) / len(self.loads)
        return max(self.loads) / mean if mean else 1.0


def shard_pieces(
    start: int, end: int, bucket_start: int, bucket_numel: int, num_ranks: int
) -> tuple[tuple[int, int], ...]:
    """[from, to) of a parameter at buffer positions [start, end) that each rank's shard holds."""
    shard = bucket_numel // num_ranks
    pieces = []
    for rank in range(num_ranks):
        low = max(start, bucket_start + rank * shard)
        high = min(end, bucket_start + (rank + 1) * shard)
        pieces.append((low - start, high - start) if high > low else (0, 0))
    return tuple(pieces)


def matrix_placements(
    template: Placement, num_blocks: int, *, has_whole_blocks: bool, tensor_ranks: int
) -> list[Placement]:
    """One placement a matrix, for a parameter that holds several stacked along the rows.

    Args:
        template: of the parameter's shard: ``shape`` and ``pieces`` are those of all its rows on
            one tensor-parallel rank, ``partition_dim`` that of each matrix.
        num_blocks: matrices, or parts of them, on each tensor-parallel rank.
        has_whole_blocks: the ranks' blocks are whole matrices that follow one another (heads).
        tensor_ranks: size of the tensor-parallel group.

    Returns:
        The matrices over all tensor-parallel ranks; of listed ones, the first rank's first.
    """
    rows, cols = template.shape[0] // num_blocks, template.shape[1]
    is_split = template.partition_dim >= 0 and tensor_ranks > 1
    whole = {0: (rows * tensor_ranks, cols), 1: (rows, cols * tensor_ranks)}
    blocks = [
        replace(
            template,
            shape=whole[template.partition_dim]
            if is_split and not has_whole_blocks
            else (rows, cols),
            pieces=tuple(_within(piece, i * rows * cols, rows * cols) for piece in template.pieces),
            partition_dim=template.partition_dim if is_split and not has_whole_blocks else -1,
        )
        for i in range(num_blocks)
    ]
    if not (has_whole_blocks and is_split):
        return blocks
    return [replace(block, tensor_rank=r) for r in range(tensor_ranks) for block in blocks]


def _within(piece: tuple[int, int], first: int, length: int) -> tuple[int, int]:
    """The part of ``piece`` that lies in [first, first + length), counted from ``first``."""
    start, end = max(piece[0] - first, 0), min(piece[1] - first, length)
    return (start, end) if end > start else (0, 0)


def held(placement: Placement, grid: RankGrid, rank: int) -> tuple[int, int]:
    """[start, end) of the flat tensor-parallel shard that ``rank`` holds; (0, 0) if none."""
    data_rank, tensor_rank = grid.coordinates(rank)
    is_elsewhere = placement.tensor_rank not in (None, tensor_rank)
    return (0, 0) if is_elsewhere else placement.pieces[data_rank]


def holders(placement: Placement, grid: RankGrid) -> list[int]:
    """Ranks of the group that hold a part (each tensor rank of a replicated one)."""
    tensor_ranks = (
        range(grid.tensor_ranks) if placement.tensor_rank is None else [placement.tensor_rank]
    )
    return [
        grid.rank(data_rank, tensor_rank)
        for data_rank, (start, end) in enumerate(placement.pieces)
        if end > start
        for tensor_rank in tensor_ranks
    ]


def lies_whole_on(placement: Placement, grid: RankGrid) -> int | None:
    """The rank that needs nothing from anybody and whose result nobody else needs."""
    here = holders(placement, grid)
    return here[0] if len(here) == 1 else None


def sends(placement: Placement, grid: RankGrid, home: int, rank: int) -> bool:
    """Whether ``rank`` provides its piece to ``home``: of copies, only the one beside it does."""
    home_data_rank, home_tensor_rank = grid.coordinates(home)
    data_rank, tensor_rank = grid.coordinates(rank)
    start, end = held(placement, grid, rank)
    is_only_copy = placement.partition_dim >= 0 or placement.tensor_rank is not None
    return (
        end > start
        and (is_only_copy or tensor_rank == home_tensor_rank)
        and (not placement.is_data_replicated or data_rank == home_data_rank)
    )


def assign_homes(
    placements: Sequence[Placement],
    grid: RankGrid,
    costs: Sequence[int],
    seed_loads: Sequence[int] | None = None,
) -> Assignment:
    """Give every matrix its home, the costliest first, each to the rank with the least load.

    Args:
        placements: the same list in the same order on every rank of the group.
        grid: shape of the group.
        costs: FLOPs of orthogonalising each of them.
        seed_loads: FLOPs each rank has already from another group, so that a rank busy with
            experts gets fewer dense matrices.
    """
    loads = list(seed_loads) if seed_loads is not None else [0] * grid.size
    mean = (sum(loads) + sum(costs)) / grid.size
    homes = [-1] * len(placements)
    moving = []
    for index, placement in enumerate(placements):
        owner = lies_whole_on(placement, grid)
        if owner is not None and loads[owner] + costs[index] <= BALANCE_SLACK * mean:
            homes[index] = owner
            loads[owner] += costs[index]
        else:
            moving.append(index)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for index in sorted(moving, key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        homes[index] = rank
        loads[rank] = load + costs[index]
        heapq.heappush(heap, (loads[rank], rank))
    return Assignment(tuple(homes), tuple(loads))
