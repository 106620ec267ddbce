"""The self-critique reward: K answers of one prompt compared in pairs, to one scalar each.

Report section 3.2.2: the model ranks its own answers pairwise against rubrics. Number of pairs,
order bias and the way to a scalar are not stated; here: every pair in **both** orders, the mean of
the two log-odds, what the critic's calibration says it gives to length taken off, and a
Bradley-Terry fit. A comparison that cannot be read counts for nothing; an answer without a readable
one is masked, never 0. A mandatory rubric that a rule can decide is decided before the critic is
asked, and answers are shown without what they say to their judge (``neutral``).
"""

import asyncio
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_k2.errors import UserError
from megatron_k2.rewards.bradley_terry import Comparison, fit
from megatron_k2.rewards.judge import Judge, Opinion, Question
from megatron_k2.rewards.neutral import neutral
from megatron_k2.rewards.record import Reward
from megatron_k2.rewards.rubrics import DEFAULT, Rubric, broken_mandatory

Schedule = Literal["all", "ring"]
"""Every pair, or each answer with its neighbours in a drawn circle: n instead of n (n - 1) / 2."""
MOST_LOG_ODDS = 4.0
"""Of one comparison: a critic that says 100 % is believed 98 %."""
FORCED = 0.98
"""What a broken mandatory rubric is worth against an answer that keeps it."""


@dataclass(frozen=True)
class Correction:
    """What a critic was found to give away for nothing (``calibration``)."""

    length_log_odds: float = 0.0
    """For the longer answer at ``length_feature`` 1."""
    longer_log_odds: float = 0.0
    """For the longer answer, by however much."""

    def applied(self, log_odds: float, first: str, second: str) -> float:
        """Log-odds of the first answer with that taken off."""
        much = self.length_log_odds * length_feature(first, second)
        return log_odds - much - self.longer_log_odds * longer(first, second)


def length_feature(first: str, second: str) -> float:
    """How much longer the first answer is, -1 to 1: tanh of twice the log-ratio of characters.

    Saturating, as a critic's taste for length is: three times as long is not better than twice.
    """
    return math.tanh(2 * math.log((len(first) + 1) / (len(second) + 1)))


def longer(first: str, second: str) -> float:
    """1, 0 or -1: whether the first answer is the longer one."""
    return float((len(first) > len(second)) - (len(first) < len(second)))


@dataclass(frozen=True)
class Verdict:
    """One pair, both orders."""

    preference: float | None
    """P(the first answer is better), symmetric in the order; ``None``: not readable."""
    forward: Opinion | None = None
    backward: Opinion | None = None
    forced_by: tuple[str, ...] = ()
    """Mandatory rubrics that decided it."""

    @property
    def num_tokens(self) -> int:
        """That the critic read and wrote."""
        return sum(one.num_tokens for one in (self.forward, self.backward) if one is not None)


@dataclass(frozen=True)
class GroupReward:
    """Rewards of one prompt's answers."""

    rewards: tuple[Reward, ...]
    deviations: tuple[float, ...]
    """Standard deviation of each strength in the fit."""
    num_comparisons: int
    num_unreadable: int
    num_tokens: int
    """That the critic read and wrote for the group."""


@dataclass(frozen=True)
class RubricReward:
    """A critic's reward.

    Args:
        judge: the critic.
        rubrics: its standards; a task adds its own by ``with_rubrics``.
        correction: of the critic's calibration.
        schedule: which pairs.
        most_comparisons: of a group, both orders counted as two; a larger group is refused.
        seed: of the ring.
    """

    judge: Judge
    rubrics: tuple[Rubric, ...] = DEFAULT
    correction: Correction = field(default_factory=Correction)
    schedule: Schedule = "all"
    most_comparisons: int = 512
    seed: int = 0

    def with_rubrics(self, rubrics: Sequence[Rubric]) -> "RubricReward":
        """The same critic with a task's rubrics behind its own."""
        return RubricReward(
            *(self.judge, (*self.rubrics, *rubrics), self.correction),
            *(self.schedule, self.most_comparisons, self.seed),
        )

    def pairs(self, num: int) -> list[tuple[int, int]]:
        """Which answers meet.

        Raises:
            UserError: more comparisons than are allowed.
        """
        if self.schedule == "all":
            found = list(itertools.combinations(range(num), 2))
        else:
            circle = random.Random(self.seed).sample(range(num), num)
            met = zip(circle, circle[1:] + circle[:1], strict=True)
            found = sorted({(min(i, j), max(i, j)) for i, j in met if i != j})
        if 2 * len(found) > self.most_comparisons:
            raise UserError(
                f"{num} answers make {2 * len(found)} comparisons, more than "
                f"{self.most_comparisons}; take schedule ring, or raise most_comparisons"
            )
        return found

    def cost(self, num: int, tokens_an_answer: int, prompt_tokens: int = 0) -> int:
        """Tokens that a critic reads for a group, at most: known before it is asked.

        Args:
            num: answers.
            tokens_an_answer: of the longest.
            prompt_tokens: of the request.
        """
        standards = sum(len(rubric.text) for rubric in self.rubrics) // 3 + 100
        return 2 * len(self.pairs(num)) * (standards + prompt_tokens + 2 * tokens_an_answer + 4)

    async def score(self, prompt: str, answers: Sequence[str]) -> GroupReward:
        """Rewards of a group, in its order.

        Raises:
            UserError: no answer, or more comparisons than are allowed.
            EngineError: the critic does not answer.
        """
        if not answers:
            raise UserError("no answers to score")
        pairs = self.pairs(len(answers))
        verdicts = await asyncio.gather(
            *(self.verdict(prompt, answers[i], answers[j]) for i, j in pairs)
        )
        read = [
            Comparison(i, j, verdict.preference)
            for (i, j), verdict in zip(pairs, verdicts, strict=True)
            if verdict.preference is not None
        ]
        found = fit(len(answers), read)
        rewards = []
        for scalar, count, answer in zip(
            found.scalars, found.num_comparisons, answers, strict=True
        ):
            is_known = count > 0 or len(answers) == 1
            reason = "" if is_known else "no comparison of it could be read"
            removed = neutral(answer).num_removed
            reason += f"{removed} sentences to the judge removed" if removed else ""
            rewards.append(Reward(float(scalar) if is_known else None, reason=reason))
        return GroupReward(
            tuple(rewards),
            tuple(map(float, found.deviations)),
            len(read),
            len(pairs) - len(read),
            sum(verdict.num_tokens for verdict in verdicts),
        )

    async def verdict(self, prompt: str, first: str, second: str) -> Verdict:
        """One pair: by a mandatory rubric that a rule decides, else by the critic, both orders."""
        broken = [broken_mandatory(answer, prompt, self.rubrics) for answer in (first, second)]
        if bool(broken[0]) != bool(broken[1]):
            is_first_broken = bool(broken[0])
            return Verdict(
                1 - FORCED if is_first_broken else FORCED, forced_by=broken[not is_first_broken]
            )
        shown = [neutral(answer).text for answer in (first, second)]
        if shown[0] == shown[1]:
            return Verdict(0.5)
        asked = Question(prompt, shown[0], shown[1], self.rubrics)
        forward, backward = await asyncio.gather(
            self.judge.compare(asked), self.judge.compare(asked.swapped())
        )
        if forward.preference is None or backward.preference is None:
            return Verdict(None, forward, backward)
        log_odds = (_log_odds(forward.preference) - _log_odds(backward.preference)) / 2
        corrected = self.correction.applied(log_odds, shown[0], shown[1])
        return Verdict(1 / (1 + math.exp(-corrected)), forward, backward)


def _log_odds(preference: float) -> float:
    bound = 1 / (1 + math.exp(-MOST_LOG_ODDS))
    p = min(max(preference, 1 - bound), bound)
    return math.log(p / (1 - p))
