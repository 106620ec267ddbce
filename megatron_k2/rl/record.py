"""What lies between sampling and training: segments, trajectories, groups.

A trajectory is the token ids of one answer as the engine read and wrote them, turn after turn,
never rendered anew from text. A segment is a stretch of it of one origin: the policy's tokens drew
one version of the weights at one temperature, everything else (prompt, tools, users) is read.
Versions are the trainer's, the number of optimizer steps behind the weights.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_k2.records.rollouts import End
from megatron_k2.records.routes import NO_ROUTES, Routes


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one origin.

    Raises:
        ValueError: numbers that are not one a token, or are no numbers; a temperature of 0.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    """Of the engine that drew them: natural logarithms at temperature 1, one each; empty for what
    the policy read."""
    weight_version: int = -1
    """Of the weights that drew them; -1 for what the policy read."""
    temperature: float = 1.0
    """They were drawn at."""
    routes: Routes = NO_ROUTES
    """Of each token, by the engine; ``NO_ROUTES`` where it gives none. A trajectory's last token
    was never an input and has none."""

    def __post_init__(self) -> None:
        if self.is_sampled and len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{len(self.logprobs)} logprobs for {len(self.token_ids)} tokens")
        if not self.is_sampled and self.logprobs:
            raise ValueError("logprobs of tokens that no version of the weights drew")
        if not all(math.isfinite(value) for value in self.logprobs):
            raise ValueError("a log-probability that is not finite")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: expected a finite number over 0")
        if self.routes and len(self.token_ids) - len(self.routes) not in (0, 1):
            raise ValueError(f"{len(self.routes)} routes for {len(self.token_ids)} tokens")

    @property
    def is_sampled(self) -> bool:
        """Whether the policy wrote them."""
        return self.weight_version >= 0


@dataclass(frozen=True)
class Trajectory:
    """One answer to a prompt, whole.

    Raises:
        ValueError: it does not begin with what was read.
    """

    segments: tuple[Segment, ...]
    reward: float | None
    """``None``: nothing is known of the answer; it is missing from its group."""
    parts: Mapping[str, float]
    """What the reward is the sum of, by name: ``verdict``, ``budget``, those of a rubric."""
    end: End
    reason: str = ""
    """What happened, in words, where it did not end by itself."""

    def __post_init__(self) -> None:
        if not self.segments or self.segments[0].is_sampled:
            raise ValueError("a trajectory begins with the prompt that the policy read")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All of it, in order."""
        return tuple(token for segment in self.segments for token in segment.token_ids)

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy wrote."""
        return sum(len(each.token_ids) for each in self.segments if each.is_sampled)

    def by_token(self) -> Iterator[tuple[int, Segment, int]]:
        """Each token, its segment, and its place there."""
        for segment in self.segments:
            for place, token in enumerate(segment.token_ids):
                yield token, segment, place


@dataclass(frozen=True)
class Group:
    """The K answers to one prompt."""

    ordinal: int
    """Of its prompt among all that the run draws; each is trained on once."""
    task_set: str
    """Its name in the run: temperatures, budgets and weights are a task set's."""
    task_id: str
    trajectories: tuple[Trajectory, ...]

    @property
    def judged(self) -> tuple[Trajectory, ...]:
        """Those with a reward."""
        return tuple(each for each in self.trajectories if each.reward is not None)

    @property
    def is_live(self) -> bool:
        """Whether two of its rewards differ: others teach nothing."""
        return len({each.reward for each in self.judged}) > 1
