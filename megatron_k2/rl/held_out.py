"""Held-out prompts, at temperature 1 and greedy.

At temperature 1 whatever the schedule samples at: a falling temperature alone lifts the reward of
what is sampled. Every evaluation draws with the same seeds, so that two of them differ by their
weights. Rewards are the verifiers' verdicts, without penalties.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.gym.episode import Bounds, play
from megatron_k2.gym.protocol import Domain, Task
from megatron_k2.rl.ledger import Ledger
from megatron_k2.rl.policy import EnginePolicy, Speaker
from megatron_k2.rl.rollouts import all_of
from megatron_k2.rl.task_sets import TaskSet

TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}


class HeldOut:
    """Tries the held-out tasks of a run.

    Args:
        task_sets: of the run.
        speaker: engine, format, seed.
        domains: open.
        ledger: that keeps what was found, so that it is not found anew.
        num_samples: of each task at temperature 1.
        concurrency: answers at once.
        bounds: of each.
    """

    def __init__(
        self,
        task_sets: Sequence[TaskSet],
        speaker: Speaker,
        domains: Mapping[str, Domain],
        ledger: Ledger,
        num_samples: int = 1,
        concurrency: int = 256,
        bounds: Bounds | None = None,
    ) -> None:
        self._task_sets, self._speaker, self._domains = task_sets, speaker, domains
        self._ledger, self._num_samples = ledger, num_samples
        self._concurrency, self._bounds = concurrency, bounds or Bounds()

    async def evaluate(self, iteration: int) -> dict[str, float]:
        """Metrics of the weights that an iteration starts from; the ledger's where it has them.

        ``eval/<set>/<sampled|greedy>``: mean verdict of the answers that were judged; with
        ``_tokens`` their mean length, with ``_unknown`` the share that nobody could judge.
        """
        if (found := self._ledger.evaluation(iteration)) is not None:
            return found
        room = asyncio.Semaphore(self._concurrency)
        results: dict[str, float] = {}
        for task_set in self._task_sets:
            for name, temperature in TEMPERATURES.items():
                number = self._num_samples if temperature else 1
                calls = [
                    self._verdict(task, f"held out/{name}/{task.id}/{k}", temperature, room)
                    for task in task_set.held_out
                    for k in range(number)
                ]
                if calls:
                    results |= _means(f"eval/{task_set.name}/{name}", await all_of(calls))
        self._ledger.evaluated(iteration, results)
        return results

    async def _verdict(
        self, task: Task, name: str, temperature: float, room: asyncio.Semaphore
    ) -> tuple[float | None, int]:
        async with room:
            policy = EnginePolicy(self._speaker, name, temperature)
            environment = self._domains[task.domain].environment()
            rollout = await play(policy, environment, task, self._bounds)
            if policy.engine_error is not None:
                raise policy.engine_error
            return rollout.reward, rollout.num_tokens


def _means(name: str, found: Sequence[tuple[float | None, int]]) -> dict[str, Any]:
    known = [reward for reward, _ in found if reward is not None]
    lengths = [length for reward, length in found if reward is not None]
    means = {f"{name}_unknown": 1 - len(known) / len(found)}
    if known:
        means |= {name: sum(known) / len(known), f"{name}_tokens": sum(lengths) / len(lengths)}
    return means
