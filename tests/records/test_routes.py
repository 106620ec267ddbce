"""Routes: taken apart and joined, compared by content, and what is refused."""

import numpy as np
import pytest

from megatron_k2.records.routes import NO_ROUTES, Routes

EXPERTS = np.random.default_rng(0).integers(0, 384, (5, 3, 2))
ROUTES = Routes.of(EXPERTS)


def test_an_array_comes_back() -> None:
    assert ROUTES.array.tolist() == EXPERTS.tolist()
    assert len(ROUTES) == 5
    assert (ROUTES.num_layers, ROUTES.top_k) == (3, 2)


@pytest.mark.parametrize("place", [slice(2), slice(1, 4), slice(-2, None), slice(4, 99)])
def test_a_part_is_the_arrays_part(place: slice) -> None:
    assert ROUTES[place].array.tolist() == EXPERTS[place].tolist()


def test_tokens_one_by_one_join_to_the_whole() -> None:
    assert Routes.joined(ROUTES) == ROUTES
    assert Routes.joined([ROUTES[:2], NO_ROUTES, ROUTES[2:]]) == ROUTES
    assert Routes.joined(reversed(list(ROUTES))) != ROUTES


def test_equal_ones_are_one_key_and_others_another() -> None:
    assert len({ROUTES, Routes.of(EXPERTS.copy()), Routes.of(EXPERTS + 1)}) == 2


@pytest.mark.parametrize("none", [ROUTES[3:3], ROUTES[9:], Routes.joined([]), NO_ROUTES[:4]])
def test_nothing_is_the_same_nothing(none: Routes) -> None:
    assert none == NO_ROUTES
    assert not none
    assert list(none) == []


@pytest.mark.parametrize("experts", [[1, 2], [[[0.5]]], [[[-1]]], [[[40_000]]], [[["a"]]]], ids=str)
def test_what_is_no_table_of_experts_is_refused(experts: list[object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Routes.of(experts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("experts", "num_layers", "top_k"), [(b"abcde", 1, 1), (b"abcd", 2, 2), (b"abcd", 0, 0)]
)
def test_bytes_that_are_no_whole_tokens_are_refused(
    experts: bytes, num_layers: int, top_k: int
) -> None:
    with pytest.raises(ValueError, match=f"{len(experts)} bytes of routes"):
        Routes(experts, num_layers, top_k)


def test_answers_of_two_models_are_not_joined() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), \(3, 2\)"):
        Routes.joined([ROUTES, Routes.of(EXPERTS.reshape(5, 2, 3))])
