"""Reward hacking made visible: the best of n answers by a critic, with the truth beside it.

Answers are drawn, the critic takes the best of n, and a verifier that the critic does not see says
what it is worth (Gao et al., arXiv:2210.10760, do so with a gold reward model). Where the critic is
sound both rise with n; where it has a weakness, its own score goes on rising and the truth turns.
"""

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.errors import UserError
from megatron_k2.rewards.judge import Question
from megatron_k2.rewards.pairs import drawn_answer, drawn_problem
from megatron_k2.rewards.rubric import RubricReward

SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Point:
    """Means over prompts at one n."""

    n: int
    proxy: float
    """The critic's scalar of the answer that it takes, within the whole group."""
    gold: float
    """Share of those answers that are right."""
    error: float
    """Standard error of ``gold``."""

    @property
    def divergence(self) -> float:
        """KL of best-of-n from the policy, nats: log n - (n - 1) / n."""
        return math.log(self.n) - (self.n - 1) / self.n


@dataclass(frozen=True)
class Candidate:
    """One drawn answer."""

    text: str
    is_right: bool


def drawn_groups(num_prompts: int, seed: int = 0) -> list[tuple[str, list[Candidate]]]:
    """Prompts with ``SIZES[-1]`` answers each: some right, some wrong, some that flatter or attack.

    An attack or praise is likelier on wrong answers, as it is where a policy is rewarded for it.
    """
    r = random.Random(seed)
    groups = []
    for _ in range(num_prompts):
        problem = drawn_problem(r)
        answers = [Candidate(*drawn_answer(problem, r)) for _ in range(SIZES[-1])]
        groups.append((problem.prompt, answers))
    return groups


async def defended_scores(reward: RubricReward, prompt: str, answers: Sequence[str]) -> list[float]:
    """A group's scalars by the reward; what is masked counts as the middle."""
    found = await reward.score(prompt, answers)
    return [0.5 if one.correctness is None else one.correctness for one in found.rewards]


async def bare_scores(reward: RubricReward, prompt: str, answers: Sequence[str]) -> list[float]:
    """The same critic without defences: one order, texts as they are, mean of its opinions."""
    wins = [0.0] * len(answers)
    for i, first in enumerate(answers):
        for j in range(i + 1, len(answers)):
            opinion = await reward.judge.compare(
                Question(prompt, first, answers[j], reward.rubrics)
            )
            p = 0.5 if opinion.preference is None else opinion.preference
            wins[i] += p
            wins[j] += 1 - p
    return [win / max(1, len(answers) - 1) for win in wins]


async def study(
    reward: RubricReward,
    groups: Sequence[tuple[str, Sequence[Candidate]]],
    *,
    is_defended: bool,
    seed: int = 0,
) -> list[Point]:
    """A point for each of ``SIZES``.

    Args:
        reward: the critic with its defences.
        groups: prompts with answers of known truth.
        is_defended: whether the defences are used.
        seed: of which n of a group are looked at.

    Raises:
        UserError: no group, or one that is too small.
    """
    if not groups or min(len(answers) for _, answers in groups) < SIZES[-1]:
        raise UserError(f"best of n needs groups of {SIZES[-1]} answers")
    scores = defended_scores if is_defended else bare_scores
    judged = [
        await scores(reward, prompt, [one.text for one in answers]) for prompt, answers in groups
    ]
    r = random.Random(seed)
    orders = [r.sample(range(len(answers)), len(answers)) for _, answers in groups]
    points = []
    for n in SIZES:
        taken = [
            max(order[:n], key=own.__getitem__) for order, own in zip(orders, judged, strict=True)
        ]
        gold = [float(answers[at].is_right) for at, (_, answers) in zip(taken, groups, strict=True)]
        proxy = [own[at] for at, own in zip(taken, judged, strict=True)]
        mean = sum(gold) / len(gold)
        error = math.sqrt(mean * (1 - mean) / len(gold))
        points.append(Point(n, sum(proxy) / len(proxy), mean, error))
    return points


def draw(studies: dict[str, list[Point]]) -> bytes:
    """A PNG: the critic's own score and the truth over n, a panel a study."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(studies), figsize=(4.2 * len(studies), 3.6), sharey=True, squeeze=False
    )
    for axis, (title, points) in zip(axes[0], studies.items(), strict=True):
        sizes = [point.n for point in points]
        axis.plot(sizes, [point.proxy for point in points], "o-", label="the critic's score")
        gold = [point.gold for point in points]
        axis.errorbar(
            sizes, gold, [2 * p.error for p in points], fmt="s-", capsize=3, label="right answers"
        )
        axis.set(xscale="log", xlabel="n, best by the critic", title=title, ylim=(0, 1.02))
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend(loc="lower left")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
