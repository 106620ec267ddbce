"""Rows that logits are made for."""

import numpy as np
import pytest
import torch

from megatron_k2.rl.asked import asked_rows

CPU = torch.device("cpu")


def gathered(values, asked):
    """What an output layer makes of the rows that each part picks: here themselves."""
    chunks = values.chunk(len(asked.parts))
    return torch.cat([chunk[own] for chunk, own in zip(chunks, asked.parts, strict=True)])


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_what_comes_of_asked_rows_returns_to_them(num_parts, share):
    is_asked = np.random.default_rng(0).random(24) < share
    values = torch.arange(1.0, 25.0)
    asked = asked_rows(is_asked, num_parts, CPU)
    found = asked.spread(gathered(values, asked))
    assert torch.equal(found, torch.where(torch.from_numpy(is_asked), values, 0.0))
    assert asked.parts.shape[1] == max(1, is_asked.reshape(num_parts, -1).sum(1).max())
    assert torch.equal(gathered(torch.arange(24), asked), asked.rows)


def test_a_repeated_row_has_no_part_in_gradients():
    is_asked = np.zeros(8, np.bool_)
    is_asked[[0, 1, 3]] = True  # the second part repeats its first row, which nobody asked for
    values = torch.arange(1.0, 9.0, requires_grad=True)
    asked = asked_rows(is_asked, 2, CPU)
    asked.spread(torch.stack([gathered(values, asked).square()] * 2)).sum().backward()
    expected = torch.where(torch.from_numpy(is_asked), 4 * values.detach(), 0.0)
    assert torch.equal(values.grad, expected)
    # Spreading what was gathered without leaving repetitions out writes into row 4.
    wrong = values.new_zeros(8).index_copy(0, asked.rows, gathered(values, asked))
    assert wrong[4] != 0
