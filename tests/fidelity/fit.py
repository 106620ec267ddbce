"""The advisory score's weights, found again: ``python -m tests.fidelity.fit``."""

import numpy as np

from megatron_k2.fidelity.advisory import features
from tests.fidelity.generated import generated
from tests.fidelity.pairs import pairs

RIDGE, STEPS = 1.0, 50
PAIRS = 168
"""That the sets weigh together, beside the ridge: as many as the tuning half has."""


def fitted():
    """Weights by name, and the bias; both sets weigh the same, and in each both labels."""
    tuning = [pair for pair in pairs() if pair.half == "tuning"]
    sets = (tuning, generated("fit"))
    rows = [features(pair.source, pair.rewrite) for each in sets for pair in each]
    names = list(rows[0])
    x = np.array([[*(row[name] for name in names), 1.0] for row in rows])
    y = np.array([pair.kind == "faithful" for each in sets for pair in each], dtype=float)
    share = np.concatenate([_shares(each) for each in sets])
    ridge = RIDGE * np.diag([1.0] * len(names) + [0.0])
    weights = np.zeros(x.shape[1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (share * (p - y)) + ridge @ weights
        curve = (x * (share * p * (1 - p))[:, None]).T @ x + ridge
        weights -= np.linalg.solve(curve, slope)
    return dict(zip(names, weights[:-1].tolist(), strict=True)), float(weights[-1])


def _shares(some):
    """A pair's weight: of PAIRS in all, half of them for each label."""
    is_good = np.array([pair.kind == "faithful" for pair in some])
    return PAIRS / 4 * np.where(is_good, 1 / is_good.sum(), 1 / (~is_good).sum())


if __name__ == "__main__":
    found, bias = fitted()
    for name, weight in found.items():
        print(f'    "{name}": {weight:.2f},')
    print(f"BIAS = {bias:.2f}")
