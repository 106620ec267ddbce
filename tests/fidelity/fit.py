"""The advisory score's weights, found again: ``python -m tests.fidelity.fit``."""

import numpy as np

from megatron_k2.fidelity.advisory import features
from tests.fidelity.pairs import pairs

RIDGE, STEPS = 1.0, 50


def fitted():
    """Weights by name, and the bias, on the tuning half; both labels weigh the same."""
    tuning = [pair for pair in pairs() if pair.half == "tuning"]
    rows = [features(pair.source, pair.rewrite) for pair in tuning]
    names = list(rows[0])
    x = np.array([[*(row[name] for name in names), 1.0] for row in rows])
    y = np.array([pair.kind == "faithful" for pair in tuning], dtype=float)
    share = np.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    ridge = RIDGE * np.diag([1.0] * len(names) + [0.0])
    weights = np.zeros(x.shape[1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (share * (p - y)) + ridge @ weights
        curve = (x * (share * p * (1 - p))[:, None]).T @ x + ridge
        weights -= np.linalg.solve(curve, slope)
    return dict(zip(names, weights[:-1].tolist(), strict=True)), float(weights[-1])


if __name__ == "__main__":
    found, bias = fitted()
    for name, weight in found.items():
        print(f'    "{name}": {weight:.2f},')
    print(f"BIAS = {bias:.2f}")
