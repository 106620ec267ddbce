"""The loop, on one screen: collect, score, update, sync.

Rank 0 alone has the engine and what collects; every rank trains. A group comes with its rewards:
scoring goes on while others are still sampled, so it is the collector's. While rank 0 collects the
others wait as ``rl/waiting.py`` says; groups then reach them by one broadcast.
"""

import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from megatron_k2.engine.protocol import Engine, EngineError, UpdateCode
from megatron_k2.rl.learner import Learner
from megatron_k2.rl.learnt import Learnt
from megatron_k2.rl.record import Group
from megatron_k2.rl.waiting import EndAsked, Waiting
from megatron_k2.weight_sync.push import Round, push
from megatron_k2.weight_sync.source import WeightSource

MOST_ROUNDS = 3
"""Of the same weights, where every engine failed at them. Choice: each waits for one to come back.
"""


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

    async def ready(self) -> None:
        """Until there is an engine that weights can be given to.

        Raises:
            EngineError: none came.
        """
        ...

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
    """Of these weights, before they were asked for; ``None``: the engine had them already."""
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
    served: int | None = None
    for number in range(learner.iteration, iterations):
        version, sync = learner.version, None
        try:
            if version != served:
                sync = await _synced(waiting, learner, source, side)
            if served is None:
                await _checked(waiting, learner, side)
            served = version
            began = time.perf_counter()
            collected = await _collected(waiting, learner, source, side, number)
        except EndAsked:
            learner.wake()
            learner.save_now()
            return
        seconds = time.perf_counter() - began
        learnt = learner.learn(collected.groups)
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
    what = "the engines' log-probabilities"
    for group in _everyones(await rested(waiting, learner, what, work)) or ():
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
    waiting: Waiting, learner: Learner, source: WeightSource, side: Side | None, number: int
) -> Collected:
    """Rank 0's groups, on every rank; weights go out again wherever they were lost meanwhile."""
    while True:
        work = None if side is None else side.collector.collect(number, learner.version)
        what = f"the rollouts of iteration {number}"
        found = _everyones(await rested(waiting, learner, what, work))
        if found is not None:
            return found
        await _synced(waiting, learner, source, side)


async def _synced(
    waiting: Waiting, learner: Learner, source: WeightSource, side: Side | None
) -> Round:
    """Today's weights, at the engine; all is at rest but them."""
    detail = ""
    for _ in range(MOST_ROUNDS):
        learner.rest(keeps_weights=True)
        await waiting.through("an engine", None if side is None else side.collector.ready())
        found = await push(source, None if side is None else side.engine, str(learner.version))
        if found.is_whole:
            return found
        detail = found.detail
        if found.code is not UpdateCode.ENGINE:
            break
    raise EngineError(f"weights of version {learner.version} did not arrive: {detail}")


async def rested[T](
    waiting: Waiting, learner: Learner, what: str, work: Coroutine[Any, Any, T] | None
) -> T | None:
    """Wait for rank 0 (``Waiting.through``) while the learner holds nothing that it can give away.

    Args:
        waiting: of this rank.
        learner: of this rank.
        what: is waited for, in words.
        work: on rank 0; ``None`` elsewhere.
    """
    learner.rest(keeps_weights=False)
    found = await waiting.through(what, work)
    learner.wake()
    return found


def _everyones[T](mine: T | None) -> T | None:
    """Rank 0's, on every rank."""
    box = [mine]
    dist.broadcast_object_list(box, src=0)
    return box[0]
