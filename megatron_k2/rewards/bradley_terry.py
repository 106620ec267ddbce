"""Strengths from pairwise preferences, with how sure they are.

Bradley and Terry (1952): P(i beats j) = σ(θ_i - θ_j). Preferences may be soft (0.7 for i), which is
the log-likelihood's own generalisation; a tie is 0.5. A Gaussian prior of a stated width makes the
fit unique where an answer won everything, or where comparisons fall into parts that never met: such
parts are placed at the prior's middle, and their uncertainty says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_k2.errors import UserError

PRIOR_WIDTH = 2.0
"""Standard deviation of θ: two answers one of which wins 98 of 100 are at 4. Ours."""
_STEPS, _ENOUGH = 100, 1e-12


class Comparison(NamedTuple):
    """One judged pair."""

    first: int
    second: int
    preference: float
    """P(first is better), 0 to 1."""
    weight: float = 1.0


@dataclass(frozen=True)
class Fit:
    """Strengths of n answers."""

    strengths: np.ndarray
    """θ, [n], of mean 0."""
    deviations: np.ndarray
    """Standard deviation of each, [n], by the curvature at the fit."""
    num_comparisons: np.ndarray
    """Of each answer, [n]."""

    @property
    def scalars(self) -> np.ndarray:
        """Mean probability of beating another of the group, [n], 0 to 1; 0.5 alone.

        Bounded, so that one lost answer cannot outweigh a group, and comparable over groups. The
        report does not say how comparisons become a reward; this is ours.
        """
        n = len(self.strengths)
        if n == 1:
            return np.full(1, 0.5)
        wins = 1 / (1 + np.exp(self.strengths[None, :] - self.strengths[:, None]))
        np.fill_diagonal(wins, 0)
        return wins.sum(1) / (n - 1)


def fit(num: int, comparisons: Sequence[Comparison], prior_width: float = PRIOR_WIDTH) -> Fit:
    """Strengths that make the comparisons likeliest.

    Args:
        num: answers.
        comparisons: any number, also none; an answer may be compared often or never.
        prior_width: standard deviation of a strength before anything is seen.

    Raises:
        UserError: a comparison of an answer with itself, of one that is not there, or a preference
            outside 0 to 1.
    """
    _check(num, comparisons)
    i = np.array([c.first for c in comparisons], dtype=int)
    j = np.array([c.second for c in comparisons], dtype=int)
    y = np.array([c.preference for c in comparisons], dtype=float)
    w = np.array([c.weight for c in comparisons], dtype=float)
    theta = np.zeros(num)
    hessian = np.eye(num) / prior_width**2
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(theta[j] - theta[i]))
        slope, bend = w * (y - p), w * p * (1 - p)
        gradient = -theta / prior_width**2
        np.add.at(gradient, i, slope)
        np.add.at(gradient, j, -slope)
        hessian = np.eye(num) / prior_width**2
        for row, column, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            np.add.at(hessian, (row, column), sign * bend)
        step = np.linalg.solve(hessian, gradient)
        # Half of what Newton would take where that is far: σ is flat out there.
        theta = theta + step * min(1.0, 4.0 / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < _ENOUGH:
            break
    counts = np.bincount(np.concatenate([i, j]), minlength=num) if num else np.zeros(0, int)
    deviations = np.sqrt(np.diag(np.linalg.inv(hessian)))
    return Fit(theta - theta.mean(), deviations, counts)


def _check(num: int, comparisons: Sequence[Comparison]) -> None:
    if num < 1:
        raise UserError(f"{num} answers to rank: expected 1 or more")
    for c in comparisons:
        is_there = 0 <= c.first < num and 0 <= c.second < num and c.first != c.second
        if not is_there or not 0 <= c.preference <= 1 or not c.weight > 0:
            raise UserError(
                f"comparison {tuple(c)}: expected two different of {num} answers, a preference "
                "from 0 to 1 and a positive weight"
            )
