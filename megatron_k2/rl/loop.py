"""The loop, on one screen: collect, score, update, sync.

Rank 0 alone has the engine and what collects; every rank trains. A group comes with its rewards:
scoring goes on while others are still sampled, so it is the collector's. While rank 0 collects the
others wait as ``rl/waiting.py`` says; groups then reach them by one broadcast.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from megatron_k2.engine.protocol import Engine, EngineError
from megatron_k2.rl.learner import Learner
from megatron_k2.rl.learnt import Learnt
from megatron_k2.rl.record import Group
from megatron_k2.rl.waiting import EndAsked, Waiting
from megatron_k2.weight_sync.push import Round, push
from megatron_k2.weight_sync.source import WeightSource


@dataclass(frozen=True)
class Collected:
    """What rank 0 has for an iteration; handed to every rank."""

    groups: tuple[Group, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the sampling, and of what else was tried with these weights."""
    position: Mapping[str, Any] = field(default_factory=dict)
    """Which record of groups they are from, JSON; it belongs to whatever trains on them."""


class Collector(Protocol):
    """What samples and scores, on rank 0."""

    async def probes(self, version: int) -> tuple[Group, ...]:
        """What engines in other processes say of texts, for the trainer to compare; or none.

        Asked before anything else is.

        Args:
            version: of the weights that they have just got.
        """
        ...

    async def collect(self, iteration: int, version: int) -> Collected | None:
        """Groups to learn from, judged; cancelled where the run is to end before they are whole.

        Args:
            iteration: from 0; the one after the last that was committed, or any since.
            version: of the weights that the engine serves.

        Returns:
            ``None``: an engine has lost its weights. They are given to it again, and this is then
            asked again.
        """
        ...

    async def committed(self, iteration: int) -> None:
        """What was collected up to this iteration is in a checkpoint that is whole."""
        ...

    async def close(self) -> None:
        """The run ends, by itself or by an error."""
        ...


@dataclass(frozen=True)
class Side:
    """What rank 0 has beside its part of the model."""

    collector: Collector
    engine: Engine


@dataclass(frozen=True)
class Iteration:
    """What one turn did; on every rank the same."""

    number: int
    version: int
    """Of the weights that it began with."""
    collected: Collected
    learnt: Learnt
    sync: Round | None
    """``None``: no step was taken, so the engine has these weights already."""
    collect_seconds: float


async def run(
    learner: Learner,
    source: WeightSource,
    side: Side | None,
    *,
    waiting: Waiting,
    iterations: int,
    show: Callable[[Iteration], None],
) -> None:
    """From where the learner is to the end, or to where Megatron's ``--exit-...`` flags end it.

    A signal ends it behind an iteration, or in the midst of collecting one: that is collected again
    from where the ledger is, by whoever goes on.

    Args:
        learner: of this rank.
        source: of the learner's weights.
        side: on rank 0; ``None`` elsewhere.
        waiting: of this rank, for rank 0.
        iterations: of the whole run.
        show: takes each iteration when it is done, on every rank; it may raise to end the run.

    Raises:
        EngineError: the engine could not take over the weights.
        LostError: a rank has gone, or what rank 0 collects with.
    """
    if learner.iteration < iterations:
        await _synced(source, side, learner.version)
        await _checked(waiting, learner, side)
    for number in range(learner.iteration, iterations):
        version = learner.version
        began = time.perf_counter()
        try:
            collected = await _collected(waiting, source, side, number, version)
        except EndAsked:
            learner.save_now()
            return
        seconds = time.perf_counter() - began
        learnt = learner.learn(collected.groups)
        sync = None
        if learner.version != version:
            sync = await _synced(source, side, learner.version)
        show(Iteration(number, version, collected, learnt, sync, seconds))
        ended = learner.end_iteration(is_last=number + 1 == iterations)
        if ended.is_saved and side is not None:
            await side.collector.committed(number)
        if ended.must_end:
            return


async def _checked(waiting: Waiting, learner: Learner, side: Side | None) -> None:
    """Engines elsewhere compute what the trainer does, or answer nothing.

    Raises:
        EngineError: one does not.
    """
    work = None if side is None else side.collector.probes(learner.version)
    for group in _everyones(await waiting.through("the engines' log-probabilities", work)) or ():
        found = learner.compare([group])
        said = f"{group.task_id}: {found}"
        if not found.mean_absolute < learner.most_difference:  # no number is no agreement
            raise EngineError(
                f"{said}; expected a mean under {learner.most_difference:g}: it holds other "
                "weights than the trainer, or computes them otherwise"
            )
        if side is not None:
            print(f"rl: {said}", flush=True)


async def _collected(
    waiting: Waiting, source: WeightSource, side: Side | None, number: int, version: int
) -> Collected:
    """Rank 0's groups, on every rank; weights go out again wherever they were lost meanwhile."""
    what = f"the rollouts of iteration {number}"
    while True:
        work = None if side is None else side.collector.collect(number, version)
        found = _everyones(await waiting.through(what, work))
        if found is not None:
            return found
        await _synced(source, side, version)


async def _synced(source: WeightSource, side: Side | None, version: int) -> Round:
    found = await push(source, None if side is None else side.engine, str(version))
    if not found.is_whole:
        raise EngineError(f"weights of version {version} did not arrive: {found.detail}")
    return found


def _everyones[T](mine: T | None) -> T | None:
    """Rank 0's, on every rank."""
    box = [mine]
    dist.broadcast_object_list(box, src=0)
    return box[0]
