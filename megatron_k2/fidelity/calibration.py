"""How well scores tell faithful rewrites from others, and the threshold to cut at.

Thresholds do not transfer: one that was set on another's rewrites kept 2 to 11 of 18 faithful ones.
So they are set on a labelled sample of the user's own, half of it to choose and half to measure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json

FAITHFUL = "faithful"


@dataclass(frozen=True)
class Scored:
    """One labelled pair's score."""

    kind: str
    """``faithful``, or a name for what is wrong."""
    score: float
    key: str
    """Of its content: which half it is in."""


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it does to pairs that did not choose it."""

    threshold: float
    auc: float
    """Of all pairs."""
    kept: float
    """Share of the measuring half's faithful pairs at or over the threshold."""
    dropped: dict[str, float] = field(default_factory=dict)
    """By kind, the share of the measuring half's that is under it."""
    num_pairs: int = 0


def auc(scored: Sequence[Scored]) -> float:
    """P(a faithful pair scores higher than another), ties a half.

    Raises:
        UserError: pairs of one label alone.
    """
    good = [each.score for each in scored if each.kind == FAITHFUL]
    bad = [each.score for each in scored if each.kind != FAITHFUL]
    if not good or not bad:
        raise UserError(
            f"{len(good)} pairs of kind {FAITHFUL!r} and {len(bad)} others; expected some of each"
        )
    wins = sum((g > b) + (g == b) / 2 for g in good for b in bad)
    return wins / (len(good) * len(bad))


def calibrate(scored: Sequence[Scored], least_kept: float = 0.8) -> Calibration:
    """The highest threshold that keeps ``least_kept`` of the choosing half's faithful pairs.

    Raises:
        UserError: too few pairs to have both labels in both halves.
    """
    halves: tuple[list[Scored], list[Scored]] = ([], [])
    for each in scored:
        halves[int(sha256_of_json(each.key)[:8], 16) % 2].append(each)
    choosing, measuring = halves
    for half in halves:
        labels = {each.kind == FAITHFUL for each in half}
        if labels != {True, False}:
            raise UserError(
                f"{len(scored)} pairs: expected faithful and other ones in each half; label more"
            )
    good = sorted((each.score for each in choosing if each.kind == FAITHFUL), reverse=True)
    threshold = good[max(math.ceil(least_kept * len(good)), 1) - 1]
    kinds = sorted({each.kind for each in measuring} - {FAITHFUL})
    shares = {kind: _share_under(measuring, kind, threshold) for kind in kinds}
    kept = 1 - _share_under(measuring, FAITHFUL, threshold)
    return Calibration(threshold, auc(scored), kept, shares, len(scored))


def _share_under(scored: Sequence[Scored], kind: str, threshold: float) -> float:
    own = [each.score for each in scored if each.kind == kind]
    return sum(each < threshold for each in own) / len(own)
