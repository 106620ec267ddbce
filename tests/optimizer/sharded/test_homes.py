"""One placement a matrix: which elements of a parameter are whose, against a walk over elements."""

import pytest
import torch

from megatron_k2.optimizer.param_groups import MatrixSpec
from megatron_k2.optimizer.sharded.homes import (
    Domain,
    Placement,
    held,
    lies_whole_on,
    make_plan,
    matrix_placements,
)

ROWS, COLS = 6, 5  # of one block on one tensor-parallel rank
SEGMENTS = (3, 2)


def placements(num_blocks, dim, tensor_ranks, pieces, *, is_listed=False):
    template = Placement("w", (num_blocks * ROWS, COLS), pieces, dim, 0)
    return matrix_placements(template, num_blocks, is_listed=is_listed, tensor_ranks=tensor_ranks)


@pytest.mark.parametrize("pieces", [((0, 60),), ((0, 7), (7, 41), (41, 60)), ((0, 0), (0, 60))])
@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_of_a_flat_shard_hold_the_elements_assemble_puts_into_them(dim, pieces):
    """Every element is numbered; ``MatrixSpec.assemble`` says which matrix it belongs to."""
    tensor_ranks, numel = 2, 2 * ROWS * COLS
    domain = Domain(tensor_ranks, len(pieces))
    shards = [torch.arange(numel).view(-1, COLS) + 100 * rank for rank in range(tensor_ranks)]
    whole = MatrixSpec(2, dim, is_expert=False).assemble(shards)
    found = placements(2, dim, tensor_ranks, pieces)
    assert [p.shape for p in found] == [tuple(matrix.shape) for matrix in whole]
    for number, (placement, matrix) in enumerate(zip(found, whole, strict=True)):
        block = number * ROWS * COLS
        collected = []
        for rank in range(domain.size):
            data_rank, tensor_rank = domain.coordinates(rank)
            first = pieces[data_rank][0]
            start, end = held(placement, domain, rank)
            flat = shards[tensor_rank].flatten()[first:]  # this rank's part begins there
            collected += flat[block + start - first : block + end - first].tolist()
        assert sorted(collected) == sorted(matrix.flatten().tolist())


def test_the_first_block_taken_for_the_second_would_be_seen():
    first, second = placements(2, 0, 1, ((0, 41), (41, 60)))
    assert first.pieces == ((0, 30), (0, 0))
    assert second.pieces == ((0, 11), (11, 30))


def test_heads_that_one_tensor_rank_holds_whole_stay_there():
    """Over two tensor ranks and one data rank nothing is sent; as split matrices all would be."""
    domain = Domain(tensor_ranks=2, data_ranks=1)
    heads = placements(4, 0, 2, ((0, 4 * ROWS * COLS),), is_listed=True)
    assert [head.tensor_rank for head in heads] == [0] * 4 + [1] * 4
    assert [head.shape for head in heads] == [(ROWS, COLS)] * 8
    homes = make_plan(heads, domain, SEGMENTS).homes
    assert homes == tuple(lies_whole_on(head, domain) for head in heads) == (0,) * 4 + (1,) * 4
    split = placements(4, 0, 2, ((0, 4 * ROWS * COLS),))
    assert all(lies_whole_on(matrix, domain) is None for matrix in split)


def test_gate_and_up_go_to_different_homes():
    domain = Domain(tensor_ranks=1, data_ranks=2)
    pair = placements(2, 0, 1, ((0, 31), (31, 60)))
    assert sorted(make_plan(pair, domain, SEGMENTS).homes) == [0, 1]
