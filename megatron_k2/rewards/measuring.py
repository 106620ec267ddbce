"""Judging pairs of known truth, to find how far a critic is to be trusted.

Each pair is judged in both orders as it stands (bare), and by ``RubricReward.verdict`` (defended)
from either side. The correction for length is fitted on one half of the prompts, every figure is of
the other half.
"""

import asyncio
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_k2.errors import UserError
from megatron_k2.rewards.calibration import Bar, Calibration, Judged, Share, Slope
from megatron_k2.rewards.judge import Judge, Question
from megatron_k2.rewards.pairs import OVERRIDE, Pair, kinds_of
from megatron_k2.rewards.rubric import Correction, RubricReward, Verdict, length_feature, longer
from megatron_k2.rewards.rubrics import DEFAULT, Rubric

_TIE = 1e-6
"""Log-odds below which neither wins."""
LEAST_FOR_LENGTH = 20
"""Pairs below which no correction for length is fitted."""


async def calibrate(
    judge: Judge,
    pairs: Sequence[Pair],
    rubrics: tuple[Rubric, ...] = DEFAULT,
    *,
    bar: Bar | None = None,
    concurrency: int = 64,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Judge every pair, bare and defended.

    Args:
        judge: the critic.
        pairs: of known truth.
        rubrics: its standards.
        bar: to hold it against.
        concurrency: pairs under way at once.
        tell: is called with how many are done.

    Raises:
        UserError: no pair is held out.
        EngineError: the critic does not answer.
    """
    if not any(pair.is_held_out for pair in pairs):
        raise UserError(f"{len(pairs)} pairs, none of which is held out; give some hundred")
    slots, done = asyncio.Semaphore(concurrency), 0

    async def one(pair: Pair) -> tuple[_Seen, _Seen]:
        nonlocal done
        async with slots:
            asked = Question(pair.prompt, pair.a, pair.b, rubrics)
            there, back = await asyncio.gather(judge.compare(asked), judge.compare(asked.swapped()))
            plain = RubricReward(judge, rubrics)
            forward, backward = await asyncio.gather(
                plain.verdict(pair.prompt, pair.a, pair.b),
                plain.verdict(pair.prompt, pair.b, pair.a),
            )
        done += 1
        tell(done, len(pairs))
        bare = _Seen(pair, there.preference, _other(back.preference))
        return bare, _Seen.of(pair, forward, backward)

    seen = await asyncio.gather(*(one(pair) for pair in pairs))
    bare, defended = [b for b, _ in seen], [d for _, d in seen]
    fitted = [one for one in defended if not one.pair.is_held_out]
    correction = _correction(fitted)
    corrected = [one.corrected(correction) for one in defended]
    return Calibration(
        judge.name,
        _judged([one for one in bare if one.pair.is_held_out]),
        _judged([one for one in corrected if one.pair.is_held_out]),
        correction,
        len(pairs),
        bar or Bar(),
    )


def _other(preference: float | None) -> float | None:
    return None if preference is None else 1 - preference


@dataclass(frozen=True)
class _Seen:
    """P(a is better) as found with a shown first, and with b shown first."""

    pair: Pair
    there: float | None
    back: float | None
    is_forced: bool = False

    @classmethod
    def of(cls, pair: Pair, forward: Verdict, backward: Verdict) -> "_Seen":
        is_forced = bool(forward.forced_by)
        return cls(pair, forward.preference, _other(backward.preference), is_forced)

    @property
    def is_readable(self) -> bool:
        return self.there is not None and self.back is not None

    @property
    def log_odds(self) -> float:
        """Mean of both orders, of a being better."""
        return (_odds(self.there) + _odds(self.back)) / 2

    def corrected(self, correction: Correction) -> "_Seen":
        if not self.is_readable or self.is_forced:
            return self
        a, b = self.pair.a, self.pair.b
        shifted = [
            1 / (1 + math.exp(-correction.applied(_odds(p), a, b))) for p in (self.there, self.back)
        ]
        return dataclasses.replace(self, there=shifted[0], back=shifted[1])

    @property
    def hit(self) -> float:
        """1 where the better answer wins by both orders together, 0.5 for a tie."""
        odds = self.log_odds if self.pair.better == "a" else -self.log_odds
        return 0.5 if abs(odds) < _TIE else float(odds > 0)

    @property
    def is_flip(self) -> bool:
        """Whether the order decides: each says another winner."""
        a, b = _odds(self.there), _odds(self.back)
        return min(abs(a), abs(b)) > _TIE and a * b < 0


def _odds(preference: float | None) -> float:
    p = min(max(0.5 if preference is None else preference, 0.018), 0.982)
    return math.log(p / (1 - p))


def _judged(seen: Sequence[_Seen]) -> Judged:
    readable = [one for one in seen if one.is_readable]
    accuracy = {}
    for kind in kinds_of([one.pair for one in seen]):
        of_kind = [one.hit for one in readable if one.pair.kind == kind]
        accuracy[kind] = Share(sum(of_kind), len(of_kind))
    attacks = [float(one.hit == 0) for one in readable if one.pair.kind == OVERRIDE]
    own = [one.hit for one in readable if not one.is_forced]
    return Judged(
        accuracy,
        Share(sum(own), len(own)),
        Share(sum(one.is_flip for one in readable), len(readable)),
        Share(sum(attacks), len(attacks)),
        Share(len(seen) - len(readable), len(seen)),
        _slope(seen),
    )


CONFOUNDED = ("praise", "justification", OVERRIDE)
"""Kinds whose worse answer is the longer one by making: they say nothing of length."""


def _design(seen: Sequence[_Seen]) -> tuple[np.ndarray, np.ndarray]:
    """(columns truth, length, longer; log-odds of a), a row a pair that the critic decided."""
    used = [
        one
        for one in seen
        if one.is_readable and not one.is_forced and one.pair.kind not in CONFOUNDED
    ]
    rows = [
        (
            1.0 if one.pair.better == "a" else -1.0,
            length_feature(one.pair.a, one.pair.b),
            longer(one.pair.a, one.pair.b),
        )
        for one in used
    ]
    return np.array(rows).reshape(-1, 3), np.array([one.log_odds for one in used])


def _correction(seen: Sequence[_Seen]) -> Correction:
    columns, odds = _design(seen)
    if len(odds) < LEAST_FOR_LENGTH:
        return Correction()
    solved = np.linalg.lstsq(columns, odds, rcond=None)[0]
    return Correction(float(solved[1]), float(solved[2]))


def _slope(seen: Sequence[_Seen]) -> Slope:
    """Least squares of log-odds over truth and length."""
    columns, odds = _design(seen)
    columns = columns[:, :2]
    if len(odds) < 4 or np.ptp(columns[:, 1]) == 0:
        return Slope(0.0, 0.0)
    solved = np.linalg.lstsq(columns, odds, rcond=None)[0]
    rest = odds - columns @ solved
    variance = float(rest @ rest) / (len(odds) - 2)
    error = math.sqrt(variance * float(np.linalg.pinv(columns.T @ columns)[1, 1]))
    return Slope(float(solved[1]), error)
