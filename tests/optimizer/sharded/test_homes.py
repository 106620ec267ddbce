"""One placement a matrix: which elements of a parameter are whose, against a walk over elements."""

import itertools

import pytest
import torch

from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.optimizer.sharded.homes import (
    Placement,
    RankGrid,
    assign_homes,
    held,
    lies_whole_on,
    matrix_placements,
)

ROWS, COLS = 6, 5  # of one block on one tensor-parallel rank
SEGMENTS = (3, 2)


def costs(found):
    return [newton_schulz_flops(*placement.shape, SEGMENTS) for placement in found]


def whole_matrices(shards, num_blocks, dim):
    """Tensor-parallel shards [rows, cols] -> the matrices whose blocks every rank has a part of."""
    blocks = [shard.chunk(num_blocks) for shard in shards]
    return [torch.cat(parts, dim) for parts in zip(*blocks, strict=True)]


def placements(num_blocks, dim, tensor_ranks, pieces, *, has_whole_blocks=False):
    template = Placement("w", (num_blocks * ROWS, COLS), pieces, dim, 0)
    return matrix_placements(
        template, num_blocks, has_whole_blocks=has_whole_blocks, tensor_ranks=tensor_ranks
    )


@pytest.mark.parametrize("cuts", [(), (7, 41), (0,)], ids=["whole", "cut twice", "on the second"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_blocks", [1, 2, 3], ids=["one", "gate and up", "three experts"])
def test_blocks_of_a_flat_shard_hold_the_elements_of_their_matrix(num_blocks, dim, cuts):
    """Every element is numbered; joining the ranks' blocks says which matrix it belongs to."""
    tensor_ranks, numel = 2, num_blocks * ROWS * COLS
    pieces = tuple(itertools.pairwise([0, *(min(cut, numel) for cut in cuts), numel]))
    grid = RankGrid(tensor_ranks, len(pieces))
    shards = [torch.arange(numel).view(-1, COLS) + 100 * rank for rank in range(tensor_ranks)]
    whole = whole_matrices(shards, num_blocks, dim)
    found = placements(num_blocks, dim, tensor_ranks, pieces)
    assert [p.shape for p in found] == [tuple(matrix.shape) for matrix in whole]
    for number, (placement, matrix) in enumerate(zip(found, whole, strict=True)):
        block = number * ROWS * COLS
        collected = []
        for rank in range(grid.size):
            data_rank, tensor_rank = grid.coordinates(rank)
            first = pieces[data_rank][0]
            start, end = held(placement, grid, rank)
            flat = shards[tensor_rank].flatten()[first:]  # this rank's part begins there
            collected += flat[block + start - first : block + end - first].tolist()
        assert sorted(collected) == sorted(matrix.flatten().tolist())


def test_the_first_block_taken_for_the_second_would_be_seen():
    first, second = placements(2, 0, 1, ((0, 41), (41, 60)))
    assert first.pieces == ((0, 30), (0, 0))
    assert second.pieces == ((0, 11), (11, 30))


def test_heads_that_one_tensor_rank_holds_whole_stay_there():
    """Over two tensor ranks and one data rank nothing is sent; as split matrices all would be."""
    grid = RankGrid(tensor_ranks=2, data_ranks=1)
    heads = placements(4, 0, 2, ((0, 4 * ROWS * COLS),), has_whole_blocks=True)
    assert [head.tensor_rank for head in heads] == [0] * 4 + [1] * 4
    assert [head.shape for head in heads] == [(ROWS, COLS)] * 8
    homes = assign_homes(heads, grid, costs(heads)).homes
    assert homes == tuple(lies_whole_on(head, grid) for head in heads) == (0,) * 4 + (1,) * 4
    split = placements(4, 0, 2, ((0, 4 * ROWS * COLS),))
    assert all(lies_whole_on(matrix, grid) is None for matrix in split)


def test_gate_and_up_go_to_different_homes():
    grid = RankGrid(tensor_ranks=1, data_ranks=2)
    pair = placements(2, 0, 1, ((0, 31), (31, 60)))
    assert sorted(assign_homes(pair, grid, costs(pair)).homes) == [0, 1]
