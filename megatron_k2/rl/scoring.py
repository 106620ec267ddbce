"""From what the gym says of a group's answers to rewards and their parts.

The report adds a budget's penalty to a verifiable reward (section 3.2.3); how is not stated. Here a
reward is the sum of its parts: ``verdict`` (the verifier's, 0 or 1), ``toggle`` (what K2.5's
alternation takes off it, in its phases), ``budget`` (minus the penalty where the answer was cut).
An answer of which nothing is known has no reward and no parts: it is missing from its group.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from megatron_k2.chat.completion import parse_completion
from megatron_k2.chat.lexer import IdLexer
from megatron_k2.chat.template import Renderer
from megatron_k2.gym.protocol import Task
from megatron_k2.records.rollouts import JUDGED, End
from megatron_k2.rewards.record import Reward, combined
from megatron_k2.rewards.rubric import RubricReward
from megatron_k2.rl.answers import Answer
from megatron_k2.rl.record import Segment
from megatron_k2.rl.task_sets import TaskSet
from megatron_k2.rl.transcript import Transcript


class Score(NamedTuple):
    """Of one answer."""

    reward: float | None
    parts: Mapping[str, float]


class GroupReward(Protocol):
    """What is known of a group's correctness, where no verifier says it: a critic's rubric."""

    async def __call__(self, task: Task, answers: Sequence[Answer]) -> Sequence[float | None]:
        """One for each answer, ``None`` where nothing is known."""


async def scores(
    task_set: TaskSet,
    task: Task,
    answers: Sequence[Answer],
    iteration: int,
    toggle_budget: int | None,
    judge: GroupReward | None = None,
) -> list[Score]:
    """A group's rewards.

    Args:
        task_set: its budget, and its Toggle.
        task: that was answered.
        answers: all of the group.
        iteration: that trains on it; Toggle's phases count in it.
        toggle_budget: the prompt's, in tokens.
        judge: instead of the verifier's verdicts.
    """
    verdicts = [each.verdict for each in answers]
    if judge is not None:
        verdicts = list(await judge(task, answers))
    less = _toggled(task_set, answers, verdicts, iteration, toggle_budget)
    found = []
    for answer, verdict, off in zip(answers, verdicts, less, strict=True):
        over = task_set.budget.penalty if answer.end is End.TOKENS else 0.0
        shaping = {"budget": 0.0 - over, **({"toggle": -off} if off else {})}
        reward = combined(Reward(verdict, shaping))
        parts = {} if verdict is None else {"verdict": verdict, **shaping}
        found.append(Score(reward, parts))
    return found


class RubricJudge:
    """A critic's rubric as a group's reward: of the last turn's text, by answers that ended.

    Args:
        reward: the critic; its scalars are 0 to 1.
        renderer: of the run; it reads ids.
    """

    def __init__(self, reward: RubricReward, renderer: Renderer) -> None:
        self._reward, self._renderer = reward, renderer

    async def __call__(self, task: Task, answers: Sequence[Answer]) -> list[float | None]:
        """See ``GroupReward``.

        Raises:
            EngineError: the critic does not answer.
        """
        found: list[float | None] = [None] * len(answers)
        places = [place for place, each in enumerate(answers) if each.end in JUDGED]
        if places:
            texts = [final_text(answers[place].segments, self._renderer) for place in places]
            judged = await self._reward.score(task.prompt, texts)
            for place, reward in zip(places, judged.rewards, strict=True):
                found[place] = reward.correctness
        return found


def final_text(segments: Sequence[Segment], renderer: Renderer) -> str:
    """What an answer's last turn says, calls left out."""
    ids = Transcript.of(segments).drawn(-1)
    return parse_completion(IdLexer(renderer.tokenizer), ids, "tolerant").content


def _toggled(
    task_set: TaskSet,
    answers: Sequence[Answer],
    verdicts: Sequence[float | None],
    iteration: int,
    budget: int | None,
) -> list[float]:
    """What Toggle takes off each verdict; those that are not known are not in its group."""
    less = [0.0] * len(answers)
    if task_set.toggle is None:
        return less
    known = [(place, verdict) for place, verdict in enumerate(verdicts) if verdict is not None]
    lengths = [answers[place].num_sampled for place, _ in known]
    given = [verdict for _, verdict in known]
    kept = task_set.toggle.rewards(iteration, given, lengths, budget)
    for (place, verdict), reward in zip(known, kept, strict=True):
        less[place] = verdict - reward
    return less
