"""A critic's lessons: pairs of known truth as packs, which the actor learns beside its answers.

Made on rank 0, of what an iteration's groups say and nothing else, so that a run which was killed
makes the same ones again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_k2.chat.template import Renderer
from megatron_k2.rewards.pairs import Pair
from megatron_k2.rewards.preferences import samples
from megatron_k2.rewards.rubrics import DEFAULT, Rubric
from megatron_k2.rl.critic import Refresher, Schedule, on_policy_pairs
from megatron_k2.rl.record import Group
from megatron_k2.rl.scoring import final_text
from megatron_k2.rl.task_sets import TaskSet
from megatron_k2.sft.packing import pack


@dataclass(frozen=True)
class Lesson:
    """A pack of dialogues, each of which is asked for its last letter; ``sft.dataset.Pack``."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    weights: NDArray[np.float32]


class Lessons(NamedTuple):
    """Of one refresh."""

    packs: tuple[Lesson, ...]
    num_too_long: int
    """Dialogues that no pack holds; they are not cut, since the letter comes last."""


def lessons(
    pairs: Sequence[Pair],
    rubrics: tuple[Rubric, ...],
    renderer: Renderer,
    num_rows: int,
    multiple: int = 1,
) -> Lessons:
    """Packs of dialogues, each pair asked in both orders.

    Args:
        pairs: to learn from.
        rubrics: that the critic is asked with.
        renderer: of the run.
        num_rows: s of a pack.
        multiple: rows of a document are a multiple of it.
    """
    written = [renderer.render(each.messages) for each in samples(pairs, rubrics)]
    room = num_rows // multiple * multiple
    kept = [(each.ids, each.loss_mask) for each in written if len(each.ids) - 1 <= room]
    if not kept:
        return Lessons((), len(written))
    lengths = np.array([len(ids) for ids, _ in kept])
    packs = pack(lengths, num_rows, multiple=multiple)
    made = tuple(_packed([kept[i] for i in packs[number]]) for number in range(len(packs)))
    return Lessons(made, len(written) - len(kept))


def _packed(dialogues: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Lesson:
    return Lesson(
        np.concatenate([np.array(ids, np.int32) for ids, _ in dialogues]),
        np.concatenate([np.array(mask, np.uint8) for _, mask in dialogues]),
        np.array([len(ids) for ids, _ in dialogues], np.int64),
        np.ones(len(dialogues), np.float32),
    )


class Made(NamedTuple):
    """The lessons of an iteration; all empty where none are due."""

    pairs: tuple[Pair, ...]
    """Of both halves, of which one is learnt from."""
    packs: tuple[Lesson, ...]
    num_too_long: int


@dataclass(frozen=True)
class LessonMaker:
    """Makes a run's lessons of its groups, and of nothing else: no engine is asked.

    Args:
        schedule: when they are due.
        renderer: of the run.
        sets: what was asked.
        num_rows: s of a pack.
        multiple: as in ``lessons``.
        rubrics: that the critic is asked with.
    """

    schedule: Schedule
    renderer: Renderer
    sets: Sequence[TaskSet]
    num_rows: int
    multiple: int = 1
    rubrics: tuple[Rubric, ...] = DEFAULT
    _prompts: dict[tuple[str, str], str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for each in self.sets:
            if each.reward != "rubric":
                self._prompts.update({(each.name, task.id): task.prompt for task in each.tasks})

    def make(self, iteration: int, groups: Sequence[Group]) -> Made:
        """What is learnt beside these groups.

        Args:
            iteration: that the groups are of.
            groups: those of sets that a rubric rewards are left out: no verifier judged them.
        """
        verified = [each for each in groups if (each.task_set, each.task_id) in self._prompts]
        pairs = on_policy_pairs(
            verified,
            lambda group: self._prompts[group.task_set, group.task_id],
            lambda answer: final_text(answer.segments, self.renderer),
        )
        training = self.schedule.training(iteration, pairs)
        if not training:
            return Made((), (), 0)
        found = lessons(training, self.rubrics, self.renderer, self.num_rows, self.multiple)
        return Made(tuple(pairs), *found)


class Teacher:
    """Makes the lessons of a run, and says what they did.

    Args:
        maker: of the run.
        refresher: of the critic.
    """

    def __init__(self, maker: LessonMaker, refresher: Refresher) -> None:
        self._maker, self._refresher = maker, refresher

    async def told(self) -> dict[str, float]:
        """What the last lessons did, once, when the engine has the weights that learnt them.

        Raises:
            EngineError: the critic does not answer.
        """
        found = await self._refresher.end()
        return {} if found is None else dict(found.metrics())

    async def lessons(
        self, iteration: int, groups: Sequence[Group]
    ) -> tuple[tuple[Lesson, ...], dict[str, float]]:
        """What is learnt beside these groups, and numbers of it.

        Args:
            iteration: that the groups are of.
            groups: of the iteration.

        Raises:
            EngineError: the critic does not answer.
        """
        made = self._maker.make(iteration, groups)
        if not made.pairs:
            return (), {}
        await self._refresher.begin(made.pairs)
        return made.packs, {"critic/too_long": float(made.num_too_long)}
