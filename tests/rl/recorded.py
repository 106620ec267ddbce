"""Rollouts as a collector would hand them over, made of random numbers, and a collector of them."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_k2.records.rollouts import End
from megatron_k2.records.routes import NO_ROUTES, Routes
from megatron_k2.rl.lessons import Lesson
from megatron_k2.rl.loop import Collected
from megatron_k2.rl.record import Group, Segment, Trajectory

VOCAB_SIZE = 128
NUM_MOE_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2


def _tokens(draw: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1, VOCAB_SIZE) for _ in range(draw.randint(low, high)))


def _routes(draw: random.Random, number: int) -> Routes:
    experts = [
        [draw.sample(range(NUM_EXPERTS), TOP_K) for _ in range(NUM_MOE_LAYERS)]
        for _ in range(number)
    ]
    return Routes.of(experts)


def _read(draw: random.Random, *, has_routes: bool, low=2, high=6) -> Segment:
    ids = _tokens(draw, low, high)
    return Segment(ids, routes=_routes(draw, len(ids)) if has_routes else NO_ROUTES)


def _wrote(draw: random.Random, lag: int, *, has_routes: bool, is_last: bool) -> Segment:
    """``weight_version`` says by how many versions it is behind, until ``stamped``."""
    ids = _tokens(draw, 2, 7)
    logprobs = tuple(draw.uniform(-6, -4) for _ in ids)
    routes = _routes(draw, len(ids) - is_last) if has_routes else NO_ROUTES
    return Segment(ids, logprobs, lag, draw.choice((1.0, 0.8)), routes)


def trajectory(
    draw: random.Random, reward: float | None, *, has_routes=False, lags=(0, 0), prompt=None
):
    segments = [prompt or _read(draw, has_routes=has_routes)]
    for number, lag in enumerate(lags):
        is_last = number + 1 == len(lags)
        segments.append(_wrote(draw, lag, has_routes=has_routes, is_last=is_last))
        if not is_last:
            segments.append(_read(draw, has_routes=has_routes))
    return Trajectory(tuple(segments), reward, {"verdict": reward or 0.0}, End.OVER)


def group(ordinal: int, rewards: Sequence[float | None], seed: int = 0, **fields) -> Group:
    draw = random.Random(f"{seed} {ordinal}")
    prompt = _read(draw, has_routes=fields.get("has_routes", False))
    found = tuple(trajectory(draw, reward, prompt=prompt, **fields) for reward in rewards)
    return Group(ordinal, "toy", f"task {ordinal}", found)


def iteration(seed: int = 0, *, has_routes=False) -> list[Group]:
    """Four groups of four: three live, one dead; an answer nobody could judge."""
    rewards = ((1, 0, 0, 1), (1, 1, 1, 1), (0, 1, None, 0), (0.25, 1, 0, 0.5))
    return [
        group(4 * seed + i, each, seed, has_routes=has_routes) for i, each in enumerate(rewards)
    ]


def lesson(number: int) -> Lesson:
    """Two dialogues, of which the last token is asked for."""
    draw = random.Random(f"lesson {number}")
    written = [_tokens(draw, 9, 20) for _ in range(2)]
    return Lesson(
        np.concatenate([np.array(ids, np.int32) for ids in written]),
        np.concatenate([np.eye(len(ids), dtype=np.uint8)[-1] for ids in written]),
        np.array([len(ids) for ids in written]),
        np.ones(2, np.float32),
    )


def stamped(groups: Sequence[Group], version: int) -> list[Group]:
    """With versions in place of what they are behind by."""

    def segment(each: Segment) -> Segment:
        if not each.is_sampled:
            return each
        return replace(each, weight_version=version - each.weight_version)

    def whole(each: Trajectory) -> Trajectory:
        return replace(each, segments=tuple(map(segment, each.segments)))

    return [replace(g, trajectories=tuple(map(whole, g.trajectories))) for g in groups]


class Scripted:
    """A collector that plays recorded iterations, and notes what it was asked and told."""

    def __init__(self, iterations: Sequence[Sequence[Group]]) -> None:
        self._iterations = iterations
        self.asked: list[tuple[int, int]] = []
        self.commits: list[int] = []

    async def ready(self) -> None:
        """It is."""

    async def probes(self, version: int) -> tuple[Group, ...]:
        return ()

    async def collect(self, iteration: int, version: int) -> Collected:
        self.asked.append((iteration, version))
        return Collected(tuple(stamped(self._iterations[iteration], version)))

    async def committed(self, iteration: int) -> None:
        self.commits.append(iteration)

    async def close(self) -> None:
        """Nothing is open."""
