"""Where an iteration's sampling ends: counted in decode steps and whole groups, never in seconds.

Report, "Agentic Rollout": long answers are paused and resumed in the next iteration. How the cut is
counted is not stated; ours is that of an engine of so many slots that decodes in lock step: answers
take slots in their order, each draws a token a step, and the cut falls at the step at which so many
groups are whole, or after so many steps. What the real engine had decoded beyond it is dropped.
So speed, concurrency and late tools decide nothing: what an iteration trains on hangs on the
answers' lengths alone.

Legend: a *run* is what one answer does in this iteration; steps are the tokens it drew in it.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_k2.errors import UserError

_COMPUTATIONS = 256
"""Of a bound over all runs, for as many askings as there are runs. Choice: of 5,000 runs that
computed them each time one took 0.65 ms, and more of more; so it is 0.01 ms (2026-11-27)."""


@dataclass(frozen=True)
class Cut:
    """When an iteration is over.

    Raises:
        UserError: a number below 1.
    """

    num_groups: int
    """Whole groups that end it."""
    num_slots: int
    """Answers that decode at once: the engine's slots, for the least to be dropped."""
    num_steps: int | None = None
    """Decode steps that end it; ``None``: only groups do."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: expected 1 or more")


def starts(durations: Sequence[float], num_slots: int) -> list[float]:
    """The step at which each run gets a slot, where they take slots in their order.

    Longer durations never make another run start earlier, so bounds of the durations give bounds
    of the starts.
    """
    slots = [0.0] * num_slots
    found = []
    for duration in durations:
        begin = heapq.heappop(slots)
        heapq.heappush(slots, begin + duration)
        found.append(begin)
    return found


class Settled(NamedTuple):
    """What the cut leaves of a run."""

    num_steps: int
    """Tokens of this iteration that are kept."""
    is_finished: bool


@dataclass
class _Run:
    group: int
    steps: int = 0
    is_finished: bool = False
    earliest: float = 0.0
    """Start, by what was known when it began: not later than the true one."""

    @property
    def duration(self) -> float:
        """Steps that it holds its slot.

        One that failed before its first token takes one as well, so that whoever starts at the cut
        comes after it.
        """
        return max(self.steps, 1) if self.is_finished else math.inf


class _Now[T]:
    """A number that only grows or only falls, computed anew every so many times that it is asked.

    Each computation takes as long as there are runs. An older number is a looser bound: of many
    runs a few then draw more than is kept, and what is kept stays the same.

    Args:
        num_runs: of the clock.
    """

    def __init__(self, num_runs: int) -> None:
        self._every, self._num_asked = 1 + num_runs // _COMPUTATIONS, 0
        self._found: T | None = None

    def get(self, compute: Callable[[], T]) -> T:
        if self._found is None or self._num_asked % self._every == 0:
            self._found = compute()
        self._num_asked += 1
        return self._found


class Clock:
    """Tells each run how far it may go, and in the end where the cut was.

    Args:
        groups: of each run, in the order in which they take slots; any integers.
        cut: when the iteration is over.
    """

    def __init__(self, groups: Sequence[int], cut: Cut) -> None:
        self._cut = cut
        self._runs = [_Run(group) for group in groups]
        self._num_open = Counter(groups)
        self._num_whole = 0
        self._bound = math.inf if cut.num_steps is None else float(cut.num_steps)
        self._starts = _Now[list[float]](len(self._runs))
        self._ends = _Now[float](len(self._runs))

    def begin(self, place: int) -> bool:
        """A run goes on; false where the cut is known to be before it."""
        run = self._runs[place]
        if place >= self._cut.num_slots:  # the others hold one from the first step on
            run.earliest = self._starts.get(self._earliest)[place]
        return run.earliest < self._bound

    def _earliest(self) -> list[float]:
        """The start of each run, if none before it drew any more."""
        return starts([run.steps for run in self._runs], self._cut.num_slots)

    def num_left(self, place: int) -> float:
        """Tokens that a run may still draw, as far as is known; 0 or less: none."""
        run = self._runs[place]
        return self._bound - run.earliest - run.steps

    def draw(self, place: int, number: int = 1) -> None:
        """A run has drawn tokens."""
        self._runs[place].steps += number

    def steps(self, place: int) -> int:
        """Tokens that a run has drawn."""
        return self._runs[place].steps

    def finish(self, place: int) -> None:
        """A run is at its answer's end."""
        run = self._runs[place]
        run.is_finished = True
        self._num_open[run.group] -= 1
        self._num_whole += not self._num_open[run.group]
        if self._num_whole >= self._cut.num_groups:
            self._bound = min(self._bound, self._ends.get(self._latest_end))

    def _latest_end(self) -> float:
        """Where the cut is at the latest: those that are not finished may never be.

        Enough groups are whole.
        """
        ends: dict[int, float] = {}
        for run, begin in zip(self._runs, self._begins(), strict=True):
            ends[run.group] = max(ends.get(run.group, 0.0), begin + run.duration)
        return sorted(ends.values())[self._cut.num_groups - 1]

    def _begins(self) -> list[float]:
        return starts([run.duration for run in self._runs], self._cut.num_slots)

    def settled(self) -> tuple[float, list[Settled]]:
        """The cut's step, and what it leaves of each run, once no run may go further."""
        if self._num_whole >= self._cut.num_groups:
            self._bound = min(self._bound, self._latest_end())
        found = []
        for run, begin in zip(self._runs, self._begins(), strict=True):
            is_finished = begin + run.duration <= self._bound < math.inf
            kept = run.steps if is_finished else min(run.steps, max(0.0, self._bound - begin))
            found.append(Settled(int(kept), is_finished))
        return self._bound, found
