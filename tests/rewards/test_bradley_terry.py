"""Strengths against scipy's minimiser over the log-likelihood as written down."""

import numpy as np
import pytest
from scipy.optimize import minimize

from megatron_k2.errors import UserError
from megatron_k2.rewards.bradley_terry import PRIOR_WIDTH, Comparison, fit


def negative_log_posterior(theta, comparisons):
    total = float(np.sum(theta**2)) / (2 * PRIOR_WIDTH**2)
    for first, second, preference, weight in comparisons:
        difference = theta[first] - theta[second]
        win, lose = np.log1p(np.exp(-difference)), np.log1p(np.exp(difference))
        total += weight * (preference * win + (1 - preference) * lose)
    return total


def by_scipy(num, comparisons):
    found = minimize(
        negative_log_posterior,
        np.zeros(num),
        (comparisons,),
        method="BFGS",
        options={"gtol": 1e-10, "maxiter": 10_000},
    )
    return found.x - found.x.mean()


def drawn(seed, num, count):
    r = np.random.default_rng(seed)
    pairs = [tuple(r.choice(num, 2, replace=False)) for _ in range(count)]
    return [
        Comparison(int(i), int(j), float(r.random()), float(r.integers(1, 4))) for i, j in pairs
    ]


@pytest.mark.parametrize(("num", "count"), [(2, 1), (4, 12), (8, 56), (6, 3)])
def test_strengths_are_scipys(num, count):
    comparisons = drawn(num, num, count)
    found = fit(num, comparisons)
    np.testing.assert_allclose(found.strengths, by_scipy(num, comparisons), atol=1e-6)


def test_deviations_are_the_curvatures():
    comparisons = drawn(3, 4, 12)
    found = fit(4, comparisons)
    at = by_scipy(4, comparisons)
    step, n = 1e-4, 4
    hessian = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
            hessian[i, j] = sum(
                a * b * negative_log_posterior(at + step * (a * np.eye(n)[i] + b * np.eye(n)[j]),
                                               comparisons)
                for a, b in signs
            ) / (4 * step**2)  # fmt: skip
    expected = np.sqrt(np.diag(np.linalg.inv(hessian)))
    np.testing.assert_allclose(found.deviations, expected, rtol=1e-3)


def test_a_win_of_everything_ties_parts_that_never_met_and_one_alone():
    sweep = fit(3, [Comparison(0, 1, 1.0), Comparison(0, 2, 1.0), Comparison(1, 2, 1.0)])
    assert sweep.scalars[0] > sweep.scalars[1] > sweep.scalars[2]
    assert np.isfinite(sweep.strengths).all()
    tied = fit(2, [Comparison(0, 1, 0.5)] * 3)
    np.testing.assert_allclose(tied.scalars, 0.5)
    apart = fit(4, [Comparison(0, 1, 1.0), Comparison(2, 3, 1.0)])
    np.testing.assert_allclose(apart.strengths[[0, 1]], apart.strengths[[2, 3]])
    never = fit(3, [Comparison(0, 1, 0.9)])
    assert never.deviations[2] == pytest.approx(PRIOR_WIDTH)
    assert never.num_comparisons.tolist() == [1, 1, 0]
    assert fit(1, []).scalars.tolist() == [0.5]


@pytest.mark.parametrize(
    ("num", "comparisons"),
    [
        (0, []),
        (2, [Comparison(0, 0, 0.5)]),
        (2, [Comparison(0, 2, 0.5)]),
        (2, [Comparison(0, 1, 1.5)]),
        (2, [Comparison(0, 1, 0.5, 0.0)]),
    ],
)
def test_what_is_no_comparison_is_refused(num, comparisons):
    with pytest.raises(UserError):
        fit(num, comparisons)
