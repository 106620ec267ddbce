"""How hard tasks are for a reference policy: pass@k, and the middle band to train on.

Report section 3.2.1 asks for moderate difficulty by the SFT model's pass@k; its thresholds are not
stated. A task that is always or never solved teaches nothing: all its rewards are equal.
"""

import asyncio
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron_k2.errors import UserError
from megatron_k2.gym.episode import Bounds, Policy, play
from megatron_k2.gym.protocol import Domain, Task
from megatron_k2.records.rollouts import Rollout

BAND = (0.1, 0.9)
"""Pass rates that are kept; ours."""


class Passed(NamedTuple):
    """Of one task's judged answers."""

    num_right: int
    num_judged: int
    num_unknown: int

    @property
    def rate(self) -> float | None:
        """pass@1; ``None`` where nothing was judged."""
        return self.num_right / self.num_judged if self.num_judged else None

    def at(self, k: int) -> float | None:
        """pass@k without bias: P(one of k answers drawn from these is right).

        Chen et al., arXiv:2107.03374: 1 - C(n - c, k) / C(n, k); ``None`` where n is below k.
        """
        n, c = self.num_judged, self.num_right
        if n < k:
            return None
        return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def passed(rollouts: Iterable[Rollout]) -> dict[str, Passed]:
    """By task."""
    rewards: dict[str, list[float | None]] = defaultdict(list)
    for each in rollouts:
        rewards[each.task_id].append(each.reward)
    return {
        name: Passed(
            sum(reward == 1.0 for reward in given),
            sum(reward is not None for reward in given),
            given.count(None),
        )
        for name, given in rewards.items()
    }


async def sample(
    policy_of: Callable[[Task, int], Policy],
    domain_of: Mapping[str, Domain],
    tasks: Sequence[Task],
    number: int,
    *,
    done: Mapping[str, int] | None = None,
    concurrency: int = 64,
    bounds: Bounds | None = None,
    keep: Callable[[Rollout], None],
) -> None:
    """Play every task ``number`` times.

    Args:
        policy_of: of a task and the number of its answer, which its seed may hang on.
        domain_of: open domains by name.
        tasks: to play.
        number: of answers to each.
        done: how many answers tasks have from before; those are not played again.
        concurrency: episodes at one time.
        bounds: of an episode.
        keep: is called with each rollout as it ends.

    Raises:
        UserError: a number that is not positive.
    """
    if number < 1 or concurrency < 1:
        raise UserError(f"{number} answers, {concurrency} at one time: expected 1 or more of each")
    free = asyncio.Semaphore(concurrency)

    async def one(task: Task, place: int) -> None:
        async with free:
            environment = domain_of[task.domain].environment()
            keep(await play(policy_of(task, place), environment, task, bounds))

    begun = done or {}
    async with asyncio.TaskGroup() as group:
        for place in range(number):
            for task in tasks:
                if place >= begun.get(task.id, 0):
                    group.create_task(one(task, place))


def measured(tasks: Iterable[Task], found: Mapping[str, Passed]) -> list[Task]:
    """Tasks with their difficulty, 1 less the pass rate; those without a verdict as they were."""
    kept = []
    for task in tasks:
        rate = found[task.id].rate if task.id in found else None
        kept.append(task if rate is None else dataclasses.replace(task, difficulty=1 - rate))
    return kept


def in_band(tasks: Iterable[Task], band: tuple[float, float] = BAND) -> list[Task]:
    """Those whose pass rate is in the band, both ends included.

    Raises:
        UserError: the band is none.
    """
    low, high = band
    if not 0 <= low <= high <= 1:
        raise UserError(f"band {low:g}:{high:g}: expected two pass rates, 0 <= low <= high <= 1")
    return [
        task for task in tasks if task.difficulty is not None and low <= 1 - task.difficulty <= high
    ]
