"""Packing against a loop over all sequences, and the fill it promises."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_k2.errors import UserError
from megatron_k2.sft.packing import METHODS, fill_of, pack, positions_of


def loads(packs, sizes):
    return sorted(int(sizes[packs[index]].sum()) for index in range(len(packs)))


def best_fit_slowly(sizes, capacity):
    """Longest first, each into the sequence with the least space that holds it."""
    spaces: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= size]
        if fitting:
            spaces[min(fitting, key=spaces.__getitem__)] -= size
        else:
            spaces.append(capacity - size)
    return sorted(capacity - space for space in spaces)


def worst_fit_slowly(sizes, capacity):
    """A deliberately wrong variant: the sequence with the most space."""
    spaces: list[int] = []
    for size in sorted(sizes, reverse=True):
        if spaces and max(spaces) >= size:
            spaces[spaces.index(max(spaces))] -= size
        else:
            spaces.append(capacity - size)
    return sorted(capacity - space for space in spaces)


def first_fit_slowly(sizes, capacity):
    spaces: list[int] = []
    for size in sizes:
        index = next((i for i, space in enumerate(spaces) if space >= size), len(spaces))
        spaces[index:] = spaces[index:] or [capacity]
        spaces[index] -= size
    return sorted(capacity - space for space in spaces)


@given(data=st.data(), method=st.sampled_from(METHODS))
@settings(max_examples=150, deadline=None)
def test_every_sample_is_in_one_sequence_and_none_is_overfull(data, method):
    multiple = data.draw(st.sampled_from([1, 2, 8]))
    capacity = multiple * data.draw(st.integers(1, 150))
    lengths = np.array(data.draw(st.lists(st.integers(2, capacity + 1), max_size=80)), dtype=int)
    packs = pack(lengths, capacity, multiple=multiple, method=method)
    sizes = positions_of(lengths, multiple)
    assert sorted(packs.samples.tolist()) == list(range(len(lengths)))
    assert all(0 < load <= capacity for load in loads(packs, sizes))
    slowly = {
        "best-fit": best_fit_slowly,
        "first-fit": first_fit_slowly,
        "none": lambda s, c: sorted(s),
    }
    assert loads(packs, sizes) == slowly[method](sizes.tolist(), capacity)


def test_the_oracle_tells_best_fit_from_worst_fit():
    rng = random.Random(0)
    sizes = [rng.randint(1, 60) for _ in range(300)]
    assert best_fit_slowly(sizes, 100) != worst_fit_slowly(sizes, 100)


@pytest.mark.parametrize("capacity", [511, 512, 513, 4096, 131_072])
def test_fill_of_a_log_normal_mix(capacity):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(600), 1.0, 20_000).astype(int), 2, capacity + 1)
    packs = pack(lengths, capacity)
    assert fill_of(packs, lengths, capacity) >= 0.99
    assert sorted(packs.samples.tolist()) == list(range(len(lengths)))


def test_padding_to_a_multiple_counts_as_space_but_not_as_fill():
    packs = pack(np.array([4, 4, 4]), 8, multiple=4)
    assert [packs[0].tolist(), packs[1].tolist()] == [[0, 1], [2]]
    assert fill_of(packs, np.array([4, 4, 4]), 8) == 9 / 16


@pytest.mark.parametrize(
    ("lengths", "capacity", "multiple", "method", "said"),
    [
        ([9], 4, 1, "best-fit", "1 of 1 samples are longer than 4 positions"),
        ([1], 4, 1, "best-fit", "nothing to predict"),
        ([2], 6, 4, "best-fit", "positive multiple of 4"),
        ([2], 4, 1, "worst-fit", "expected one of best-fit, first-fit, none"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths, capacity, multiple, method, said):
    with pytest.raises(UserError, match=said):
        pack(np.array(lengths), capacity, multiple=multiple, method=method)
