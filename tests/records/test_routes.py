"""Routes: taken apart and joined, compared by content, as JSON, and what is refused."""

import json

import numpy as np
import pytest

from megatron_k2.records.routes import NO_ROUTES, Routes, routes_from

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


@pytest.mark.parametrize("routes", [ROUTES, NO_ROUTES])
def test_json_brings_them_back(routes: Routes) -> None:
    assert routes_from(json.loads(json.dumps(routes.to_object()))) == routes


@pytest.mark.parametrize(
    "row",
    [
        None,
        [],
        ["AAAA", 1],
        ["AAAAAAA=", 1, 1],  # five bytes
        ["AAAAAA==", 2, 2],
        ["AAA", 1, 1],
        ["", 0, 0, 0],
        [[[[1]]]],
    ],
)
def test_json_of_another_form_is_refused(row: object) -> None:
    with pytest.raises(ValueError, match="not routes"):
        routes_from(row)


@pytest.mark.parametrize("experts", [[1, 2], [[[0.5]]], [[[-1]]], [[[40_000]]], [[["a"]]]], ids=str)
def test_what_is_no_table_of_experts_is_refused(experts: list[object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Routes.of(experts)  # type: ignore[arg-type]


def test_answers_of_two_models_are_not_joined() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), \(3, 2\)"):
        Routes.joined([ROUTES, Routes.of(EXPERTS.reshape(5, 2, 3))])
