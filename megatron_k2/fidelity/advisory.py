"""A score of a rewrite from its surface alone: advice where to look, never a verdict.

A logistic regression over what ``surface``, ``events``, ``numbers`` and ``roles`` see, fitted on
pairs of fictional facts (``tests/fidelity/fit.py``). On near copies that change the meaning, beside
faithful text in another style and by another hand, such scores were measured to be at chance: rank
by it, spend a model's questions by it, and believe none of it.
"""

import math
from collections.abc import Mapping

from megatron_k2.fidelity import numbers, roles
from megatron_k2.fidelity.events import are_reversed
from megatron_k2.fidelity.statements import statements
from megatron_k2.fidelity.surface import Surface, roles_swapped

WEIGHTS: Mapping[str, float] = {
    "new number": -1.55,
    "number left out": -1.84,
    "new name": -1.35,
    "name left out": -1.27,
    "negation": -1.54,
    "worst of the rewrite": -1.27,
    "worst of the source": -1.43,
    "mean of the source": -0.47,
    "order": -0.12,
    "events": -1.67,
    "roles": -0.59,
    "numbers exchanged": -1.19,
    "bounds": -0.70,
}
BIAS = 1.96
_ALIKE = 0.5
"""Overlap from which two sentences are compared; ours."""


def features(source: str, rewrite: str) -> dict[str, float]:
    """What the score weighs, each from 0 (nothing speaks against it) to 1 or a little more."""
    surface = Surface(source, rewrite)
    names = [each.name for each in surface.advice()]
    stated = [pair for pair in surface.forward if statements(pair.sentence)]
    forward = [pair.overlap for pair in stated] or [0.0]
    reverse = [pair.overlap for pair in surface.reverse] or [0.0]
    beside = [(pair.sentence, pair.other) for pair in surface.reverse if pair.overlap >= _ALIKE]
    return {
        "new number": float(bool(surface.gates())),
        "number left out": float("number left out" in names),
        "new name": float("new name" in names),
        "name left out": float("name left out" in names),
        "negation": min(names.count("negation"), 4) / 4,
        "worst of the rewrite": 1 - min(forward),
        "worst of the source": 1 - min(reverse),
        "mean of the source": 1 - sum(reverse) / len(reverse),
        "order": max((roles_swapped(*each) for each in beside), default=0.0),
        "events": float(any(are_reversed(*each) for each in beside)),
        "roles": max((roles.are_exchanged(*each) for each in beside), default=0.0),
        "numbers exchanged": float(any(numbers.are_exchanged(*each) > 0.5 for each in beside)),
        "bounds": float(any(numbers.have_other_bounds(*each) for each in beside)),
    }


def score(source: str, rewrite: str) -> float:
    """0 to 1, higher the less speaks against the rewrite."""
    found = features(source, rewrite)
    total = BIAS + sum(WEIGHTS[name] * value for name, value in found.items())
    return 1 / (1 + math.exp(min(-total, 700.0)))
