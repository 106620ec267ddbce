"""A score of a rewrite from its surface alone: advice where to look, never a verdict.

A logistic regression over what ``surface`` sees, fitted on pairs of fictional facts
(``tests/fidelity/fit.py``). On near copies that change the meaning, beside faithful text in
another style and by another hand, such scores were measured to be at chance: rank by it, spend a
model's questions by it, and believe none of it.
"""

import math
from collections.abc import Mapping

from megatron_k2.fidelity.events import are_reversed
from megatron_k2.fidelity.quantities import quantities, shown
from megatron_k2.fidelity.sentences import content
from megatron_k2.fidelity.statements import statements
from megatron_k2.fidelity.surface import Surface, roles_swapped

WEIGHTS: Mapping[str, float] = {
    "new number": -1.07,
    "number left out": -1.54,
    "new name": -1.21,
    "name left out": -1.24,
    "negation": -0.57,
    "opposite": -0.25,
    "worst of the rewrite": -1.40,
    "worst of the source": -1.57,
    "mean of the rewrite": -0.06,
    "mean of the source": -0.31,
    "order": -0.54,
    "events": -1.32,
    "numbers' neighbours": -0.92,
}
BIAS = 2.24
_NEAR = 1
"""Words on either side that a number goes with; ours."""


def features(source: str, rewrite: str) -> dict[str, float]:
    """What the score weighs, each from 0 (nothing speaks against it) to 1 or a little more."""
    surface = Surface(source, rewrite)
    names = [each.name for each in surface.advice()]
    stated = [pair for pair in surface.forward if statements(pair.sentence)]
    forward = [pair.overlap for pair in stated] or [0.0]
    reverse = [pair.overlap for pair in surface.reverse] or [0.0]
    alike = [pair for pair in surface.reverse if pair.overlap >= 0.5]
    return {
        "new number": float(bool(surface.gates())),
        "number left out": float("number left out" in names),
        "new name": float("new name" in names),
        "name left out": float("name left out" in names),
        "negation": min(names.count("negation"), 4) / 4,
        "opposite": float("opposite" in names),
        "worst of the rewrite": 1 - min(forward),
        "worst of the source": 1 - min(reverse),
        "mean of the rewrite": 1 - sum(forward) / len(forward),
        "mean of the source": 1 - sum(reverse) / len(reverse),
        "order": max((roles_swapped(p.sentence, p.other) for p in alike), default=0.0),
        "events": float(any(are_reversed(p.sentence, p.other) for p in alike)),
        "numbers' neighbours": _moved_numbers(source, rewrite),
    }


def score(source: str, rewrite: str) -> float:
    """0 to 1, higher the less speaks against the rewrite."""
    found = features(source, rewrite)
    total = BIAS + sum(WEIGHTS[name] * value for name, value in found.items())
    return 1 / (1 + math.exp(min(-total, 700.0)))


def _moved_numbers(source: str, rewrite: str) -> float:
    """1 where a number of both texts stands beside what another number of the source stood by."""
    there, here = _neighbours(source), _neighbours(rewrite)
    worst = 0.0
    for value, words in here.items():
        if value not in there or len(there) < 2:
            continue
        own = _alike(words, there[value])
        others = max(_alike(words, those) for other, those in there.items() if other != value)
        worst = max(worst, others - own)
    return worst


def _neighbours(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for each in quantities(text):
        if not each.is_idle:
            before, after = content(text[: each.start])[-_NEAR:], content(text[each.end :])[:_NEAR]
            found.setdefault(shown(each.value), set()).update(before, after)
    return found


def _alike(some: set[str], others: set[str]) -> float:
    return len(some & others) / min(len(some), len(others)) if some and others else 0.0
