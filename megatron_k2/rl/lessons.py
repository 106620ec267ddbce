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
from megatron_k2.rewards.rubrics import Rubric
from megatron_k2.rl.critic import Refresher, on_policy_pairs
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


@dataclass
class Teacher:
    """Makes the lessons of a run, and says what they did.

    Args:
        refresher: of the critic.
        renderer: of the run.
        sets: what was asked.
        num_rows: s of a pack.
        multiple: as in ``lessons``.
    """

    refresher: Refresher
    renderer: Renderer
    sets: Sequence[TaskSet]
    num_rows: int
    multiple: int = 1
    _prompts: dict[tuple[str, str], str] = field(init=False)

    def __post_init__(self) -> None:
        self._prompts = {
            (each.name, task.id): task.prompt
            for each in self.sets
            if each.reward != "rubric"
            for task in each.tasks
        }

    async def told(self) -> dict[str, float]:
        """What the last lessons did, once, when the engine has the weights that learnt them.

        Raises:
            EngineError: the critic does not answer.
        """
        found = await self.refresher.end()
        return {} if found is None else dict(found.metrics())

    async def lessons(
        self, iteration: int, groups: Sequence[Group]
    ) -> tuple[tuple[Lesson, ...], dict[str, float]]:
        """What is learnt beside these groups, and numbers of it.

        Args:
            iteration: that the groups are of.
            groups: those of sets that a rubric rewards are left out: no verifier judged them.

        Raises:
            EngineError: the critic does not answer.
        """
        verified = [each for each in groups if (each.task_set, each.task_id) in self._prompts]
        pairs = on_policy_pairs(
            verified,
            lambda group: self._prompts[group.task_set, group.task_id],
            lambda answer: final_text(answer.segments, self.renderer),
        )
        training = await self.refresher.begin(iteration, pairs)
        if not training:
            return (), {}
        found = lessons(
            training, self.refresher.rubrics, self.renderer, self.num_rows, self.multiple
        )
        return found.packs, {"critic/too_long": float(found.num_too_long)}
