"""Segments, trajectories and groups: what is read off them, and what is refused."""

import math

import pytest

from megatron_k2.records.rollouts import End
from megatron_k2.records.routes import Routes
from megatron_k2.rl.record import Group, Segment, Trajectory

READ = Segment((5, 6, 7), routes=Routes.of([[[0, 1]], [[2, 3]], [[1, 0]]]))
WROTE = Segment((8, 9), (-0.5, -1.25), 3, 0.8, Routes.of([[[3, 1]]]))


def _trajectory(reward: float | None = 1.0) -> Trajectory:
    return Trajectory((READ, WROTE), reward, {"verdict": 1.0}, End.OVER)


def test_answers_without_a_reward_are_missing_from_their_group() -> None:
    group = Group(7, "sort", "abc", (_trajectory(), _trajectory(None), _trajectory(0.0)))
    assert len(group.judged) == 2
    assert group.is_live
    assert not Group(7, "sort", "abc", (_trajectory(), _trajectory(None))).is_live


def test_tokens_come_in_order_with_what_is_known_of_them() -> None:
    trajectory = _trajectory()
    assert trajectory.token_ids == (5, 6, 7, 8, 9)
    assert trajectory.num_sampled == 2
    assert [(token, place) for token, _, place in trajectory.by_token()][-1] == (9, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"logprobs": (-1.0,)},
        {"logprobs": (-1.0, math.nan)},
        {"weight_version": -1},
        {"temperature": 0.0},
        {"routes": Routes.of([[[0]]] * 3)},
    ],
)
def test_a_segment_whose_numbers_do_not_fit_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d|no version|finite"):
        Segment(**{**vars(WROTE), **changed})  # type: ignore[arg-type]


def test_a_trajectory_begins_with_what_was_read() -> None:
    with pytest.raises(ValueError, match="begins with the prompt"):
        Trajectory((WROTE,), 1.0, {}, End.OVER)
