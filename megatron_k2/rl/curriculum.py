"""Which prompt comes next: by its ordinal, the run's seed, and what earlier groups showed.

The report keeps prompts of moderate difficulty, K1.5 draws them in proportion to how often they
fail (section 2.3.4 there); thresholds are not stated. Ours: every task of a set once, in a seeded
order; then in proportion to the failure rate of its last answers; one that was always or never
right in all of them is left out, until a set has no other.

What is known of a task is known from the ledger alone, in the ledger's order: a run that is resumed
draws the prompts that it would have drawn.
"""

import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from megatron_k2.errors import UserError
from megatron_k2.gym.protocol import Task
from megatron_k2.rl.task_sets import TaskSet

LEAST_SHARE = 0.02
"""Ours: a task that hardly fails is still drawn now and then, to see whether it still does."""


@dataclass(frozen=True)
class Prompt:
    """One draw."""

    ordinal: int
    task_set: str
    task_id: str


@dataclass(frozen=True)
class Curriculum:
    """How prompts are chosen.

    Raises:
        UserError: fewer than one answer.
    """

    num_answers: int = 16
    """The last answers to a task that its rate is of, and the least that leave it out."""

    def __post_init__(self) -> None:
        if self.num_answers < 1:
            raise UserError(f"curriculum over {self.num_answers} answers; expected 1 or more")


@dataclass
class _Known:
    """Of one task."""

    num_drawn: int = 0
    verdicts: deque[float] = field(default_factory=deque)
    toggle_budget: int | None = None

    @property
    def failure_rate(self) -> float:
        return 1 - sum(self.verdicts) / len(self.verdicts) if self.verdicts else 0.5


class Stream:
    """Prompts by ordinal.

    Args:
        task_sets: of the run.
        seed: of the run.
        curriculum: how prompts are chosen.
    """

    def __init__(
        self, task_sets: Sequence[TaskSet], seed: int, curriculum: Curriculum | None = None
    ) -> None:
        self.task_sets = {each.name: each for each in task_sets}
        self._seed, self._curriculum = seed, curriculum or Curriculum()
        self._known: dict[tuple[str, str], _Known] = {}
        self._order: dict[str, list[str]] = {}
        self._tasks: dict[tuple[str, str], Task] = {}
        for each in task_sets:
            self._tasks |= {(each.name, task.id): task for task in each.tasks}
            ids = [task.id for task in each.tasks]
            random.Random(f"{seed}/{each.name}").shuffle(ids)
            self._order[each.name] = ids
            self._known |= {(each.name, name): _Known() for name in ids}

    def task(self, task_set: str, task_id: str) -> Task:
        """What a prompt, or a group, is of."""
        return self._tasks[task_set, task_id]

    def drawn(self, prompt: Prompt) -> None:
        """A prompt was drawn, now or before a restart."""
        self._known[prompt.task_set, prompt.task_id].num_drawn += 1

    def answered(
        self, prompt: Prompt, verdicts: Sequence[float | None], lengths: Sequence[int]
    ) -> None:
        """A group was trained on, now or before a restart; answers that nobody judged say nothing.

        Args:
            prompt: of the group.
            verdicts: of its answers.
            lengths: of the same, in tokens.
        """
        known = self._known[prompt.task_set, prompt.task_id]
        known.verdicts.extend(each for each in verdicts if each is not None)
        while len(known.verdicts) > self._curriculum.num_answers:
            known.verdicts.popleft()
        toggle = self.task_sets[prompt.task_set].toggle
        if toggle is not None and known.toggle_budget is None:
            right = [
                n
                for n, each in zip(lengths, verdicts, strict=True)
                if each is not None and each >= 1
            ]
            known.toggle_budget = toggle.budget(right)

    def toggle_budget(self, prompt: Prompt) -> int | None:
        """Toggle's, of the first group in which an answer was right."""
        return self._known[prompt.task_set, prompt.task_id].toggle_budget

    def draw(self, ordinal: int, busy: Collection[tuple[str, str]] = ()) -> Prompt:
        """The prompt of an ordinal.

        Args:
            ordinal: its place among all prompts of the run.
            busy: (task set, task id) of prompts in play, which are passed over where others are
                left.
        """
        order = random.Random(f"{self._seed}/{ordinal}")
        sets = list(self.task_sets.values())
        name = order.choices(sets, [each.weight for each in sets])[0].name
        ids = self._order[name]
        free = [each for each in ids if (name, each) not in busy] or ids
        new = next((each for each in free if not self._known[name, each].num_drawn), None)
        if new is not None:
            return Prompt(ordinal, name, new)
        open_ = [each for each in free if not self.is_left_out(name, each)] or free
        shares = [max(self._known[name, each].failure_rate, LEAST_SHARE) for each in open_]
        return Prompt(ordinal, name, order.choices(open_, shares)[0])

    def is_left_out(self, task_set: str, task_id: str) -> bool:
        """Whether all of its last answers were right, or all wrong."""
        known = self._known[task_set, task_id].verdicts
        is_known = len(known) >= self._curriculum.num_answers
        return is_known and (min(known) >= 1 or max(known) <= 0)

    @property
    def num_left_out(self) -> dict[str, int]:
        """Tasks that the curriculum leaves out now, by task set."""
        return {
            name: sum(self.is_left_out(name, each) for each in ids)
            for name, ids in self._order.items()
        }
