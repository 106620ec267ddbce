"""The critic's closed loop: rollouts of verifiable prompts teach it, while it judges the others.

Report section 3.2.2: the critic is refined with on-policy rollouts of prompts with verifiable
rewards, so that its standard moves with the policy. What the report leaves open, and is ours:

- **Pairs.** Of each live group right answers against wrong ones, by the verifier's verdict and not
  by the reward, a few of each group, so that no prompt weighs for its length.
- **Loss.** The letter's negative log-likelihood, each pair in both orders
  (``rewards/preferences.py``): what fine-tuning bootstrapped it with.
- **Schedule.** Every n iterations, on the last pairs alone; what it said of older policies' answers
  is of no use.
- **Whose weights.** Whatever stands behind ``Refreshable``: the actor's own, where the dialogues go
  into its PTX stream; a copy; or adapters. ``EngineJudge`` asks the engine that samples.

Each refresh is measured on pairs of prompts that it did not see, before and after.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class Refreshable(Judge, Protocol):
    """A critic that can be taught."""

    async def refresh(self, pairs: Sequence[Pair]) -> None:
        """Learn which of two answers is better.

        Args:
            pairs: of known truth; none of them is held out.
        """
        ...


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


class PairPool:
    """The last pairs, one prompt in one half only.

    Args:
        capacity: pairs that are kept; the oldest go.

    Raises:
        UserError: room for none.
    """

    def __init__(self, capacity: int = 2048) -> None:
        if capacity < 1:
            raise UserError(f"a pool of {capacity} pairs: expected 1 or more")
        self._pairs: deque[Pair] = deque(maxlen=capacity)

    def add(self, pairs: Sequence[Pair]) -> None:
        """Newer ones."""
        self._pairs.extend(pairs)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All, oldest first."""
        return tuple(self._pairs)

    @property
    def training(self) -> tuple[Pair, ...]:
        """Those that a critic may learn from."""
        return tuple(pair for pair in self._pairs if not pair.is_held_out)


class Refreshed(NamedTuple):
    """What one refresh did."""

    num_pairs: int
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
class Refresher:
    """When and on what a critic is refreshed.

    Attributes:
        critic: to be taught.
        pool: of pairs; whoever runs the loop adds to it.
        every: iterations between refreshes.
        least_pairs: fewer teach nothing, and are waited for.
        rubrics: that the critic is asked with.
    """

    critic: Refreshable
    pool: PairPool
    every: int = 5
    least_pairs: int = 32
    rubrics: tuple[Rubric, ...] = DEFAULT

    def is_due(self, iteration: int) -> bool:
        """Whether to refresh after an iteration."""
        is_time = (iteration + 1) % self.every == 0
        num_training, num_all = len(self.pool.training), len(self.pool.pairs)
        return is_time and num_all >= self.least_pairs and 0 < num_training < num_all

    async def refresh(self) -> Refreshed:
        """Measure, teach, measure again.

        Raises:
            EngineError: the critic does not answer.
        """
        before = await self._accuracy()
        await self.critic.refresh(self.pool.training)
        return Refreshed(len(self.pool.training), before, await self._accuracy())

    async def _accuracy(self) -> float:
        found = await calibrate(self.critic, self.pool.pairs, self.rubrics)
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
