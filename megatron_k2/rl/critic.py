"""The critic's closed loop: rollouts of verifiable prompts teach it, while it judges the others.

Report section 3.2.2: the critic is refined with on-policy rollouts of prompts with verifiable
rewards, so that its standard moves with the policy. What the report leaves open, and is ours:

- **Pairs.** Of each live group right answers against wrong ones, by the verifier's verdict and not
  by the reward, a few of each group, so that no prompt weighs for its length.
- **Loss.** The letter's negative log-likelihood, each pair in both orders
  (``rewards/preferences.py``): what fine-tuning bootstrapped it with.
- **Schedule.** Every n iterations, on that iteration's pairs alone: answers of older policies are
  what it must not be kept to, and nothing has to be remembered over a restart.
- **Whose weights.** The actor's own: lessons are packs beside its answers, a term of its loss
  (``lessons.py``), and ``EngineJudge`` asks the engine that samples.

Each refresh is measured on pairs of prompts that it did not see, before and after.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_k2.chat.template import Renderer
from megatron_k2.engine.protocol import Engine, Request, SamplingParams, Token
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.records.messages import Message
from megatron_k2.rewards.judge import LETTERS, SYSTEM, Judge, Opinion, Question
from megatron_k2.rewards.measuring import calibrate
from megatron_k2.rewards.pairs import Pair
from megatron_k2.rewards.rubrics import DEFAULT, Rubric
from megatron_k2.rl.record import Group, Trajectory

KIND = "on-policy"
_NUM_LIKELIEST = 20


def on_policy_pairs(
    groups: Sequence[Group],
    prompt_of: Callable[[Group], str],
    text_of: Callable[[Trajectory], str],
    most: int = 2,
) -> list[Pair]:
    """Pairs of known truth from verified groups.

    Args:
        groups: of verifiable prompts.
        prompt_of: what a group was asked.
        text_of: what a trajectory answered.
        most: pairs of one group; each answer is in one at most.
    """
    found = []
    for group in groups:
        right, wrong = (
            list(dict.fromkeys(text_of(each) for each in group.judged if _is_right(each) is truth))
            for truth in (True, False)
        )
        for good, bad in list(zip(_mixed(right), _mixed(wrong), strict=False))[:most]:
            if good != bad:
                is_a = int(sha256_of_json([group.ordinal, good, bad])[:8], 16) % 2 == 0
                texts = (good, bad) if is_a else (bad, good)
                found.append(Pair(prompt_of(group), *texts, "a" if is_a else "b", KIND))
    return found


def _is_right(trajectory: Trajectory) -> bool:
    return trajectory.parts.get("verdict", 0.0) >= 1.0


def _mixed(texts: Sequence[str]) -> list[str]:
    """In an order that says nothing of when they came."""
    return sorted(texts, key=sha256_of_json)


class Refreshed(NamedTuple):
    """What one refresh did."""

    num_pairs: int
    """That were learnt from."""
    before: float
    after: float
    """Share of held-out pairs that the critic, with its defences, decides rightly."""

    def metrics(self) -> Mapping[str, float]:
        """For the run's record."""
        return {
            "critic/pairs": self.num_pairs,
            "critic/accuracy_before": self.before,
            "critic/accuracy_after": self.after,
        }


@dataclass(frozen=True)
class Schedule:
    """When a critic is refreshed, and on what.

    Raises:
        UserError: numbers under 1.
    """

    every: int = 5
    """Iterations between refreshes."""
    least_pairs: int = 32
    """Fewer teach nothing."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"{name} {value} of a critic's refresh: expected 1 or more")

    def training(self, iteration: int, pairs: Sequence[Pair]) -> list[Pair]:
        """What the critic is to learn from now: none if it is not time, or there are too few.

        Args:
            iteration: that the pairs are of.
            pairs: of known truth; a prompt's are in one half, which is held out or not.
        """
        found = [pair for pair in pairs if not pair.is_held_out]
        is_time = (iteration + 1) % self.every == 0
        is_enough = len(pairs) >= self.least_pairs and 0 < len(found) < len(pairs)
        return found if is_time and is_enough else []


class Refresher:
    """What a refresh does to a critic that is taught between ``begin`` and ``end``.

    Args:
        critic: that is taught.
        rubrics: that it is asked with.
    """

    def __init__(self, critic: Judge, rubrics: tuple[Rubric, ...] = DEFAULT) -> None:
        self._critic, self._rubrics = critic, rubrics
        self._under_way: tuple[Sequence[Pair], float] | None = None

    async def begin(self, pairs: Sequence[Pair]) -> None:
        """Measure it as it is.

        Args:
            pairs: of both halves.

        Raises:
            EngineError: the critic does not answer.
        """
        self._under_way = pairs, await self._accuracy(pairs)

    async def end(self) -> Refreshed | None:
        """What was done since ``begin``, once; ``None``: there was none.

        Raises:
            EngineError: the critic does not answer.
        """
        if self._under_way is None:
            return None
        (pairs, before), self._under_way = self._under_way, None
        num_training = sum(not pair.is_held_out for pair in pairs)
        return Refreshed(num_training, before, await self._accuracy(pairs))

    async def _accuracy(self, pairs: Sequence[Pair]) -> float:
        found = await calibrate(self._critic, pairs, self._rubrics)
        return found.defended.overall.value


class EngineJudge:
    """A critic that is asked by token ids: the actor's own engine, by the letters' probabilities.

    Args:
        engine: that holds its weights.
        renderer: of its chat format.
        name: of it.

    Raises:
        UserError: a letter is more than one token.
    """

    def __init__(self, engine: Engine, renderer: Renderer, name: str = "actor") -> None:
        self.name = name
        self._engine, self._renderer, self._number = engine, renderer, 0
        self._letters = {letter: tuple(renderer.tokenizer.encode(letter)) for letter in LETTERS}
        for letter, ids in self._letters.items():
            if len(ids) != 1:
                raise UserError(f"the tokenizer writes {letter!r} as {len(ids)} tokens; expected 1")

    async def compare(self, question: Question) -> Opinion:
        """The first token's probability of A against B.

        Raises:
            EngineError: the engine does not answer.
        """
        messages = (Message("system", SYSTEM), Message("user", question.text(thinks=False)))
        prompt = tuple(self._renderer.render(messages, add_generation_prompt=True).ids)
        likeliest = min(_NUM_LIKELIEST, self._engine.limits.vocab_size)
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=likeliest)
        self._number += 1
        request = Request(f"{self.name}/{self._number}", prompt, params)
        tokens = [token async for out in self._engine.generate(request) for token in out.tokens]
        return Opinion(self._preference(tokens[0]) if tokens else None, len(prompt) + len(tokens))

    def _preference(self, token: Token) -> float | None:
        seen = {candidate.id: candidate.logprob for candidate in token.top}
        a, b = (seen.get(ids[0]) for ids in self._letters.values())
        if a is None and b is None:
            return None
        if a is None or b is None:  # the one that is not among the likeliest is not likelier
            return float(b is None)
        return 1 / (1 + math.exp(min(b - a, 700.0)))
