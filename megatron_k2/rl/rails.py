"""What tells of a run that goes wrong, from its metrics alone: alarms that warn or stop.

The report names no such bounds. Those here are ours, seen on small models where a learning rate too
large lets the reward fall within ten iterations and nothing brings it back. A rail is a function of
the metrics before it and of nothing else, so that a resumed run decides as one that never stopped.
"""

import fnmatch
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_k2.errors import UserError

Kind = Literal["above", "below", "fall", "growth"]
"""Over a bound; under one; under the best median so far by more; a factor over the first median."""
Action = Literal["warn", "stop"]
WINDOW = 5
"""Iterations whose median stands for now, and whose first median for the beginning."""

type Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Rail:
    """One bound.

    Attributes:
        name: what ``--rail`` calls it.
        metric: a metric's name, ``*`` for any part of it.
        kind: how ``bound`` is meant.
        bound: in the metric's unit; of *growth* a factor.
        action: what an alarm asks for.
        says: what it is a sign of.
    """

    name: str
    metric: str
    kind: Kind
    bound: float
    action: Action
    says: str


RAILS = (
    Rail("reward", "rl/verdict/*", "fall", 0.35, "stop", "the policy unlearns; lower --lr"),
    Rail("held-out", "eval/*/sampled", "fall", 0.25, "stop", "the policy unlearns; lower --lr"),
    Rail("kl", "learn/kl", "above", 0.5, "stop", "a step goes far from pi_old; lower --lr"),
    Rail("mismatch", "learn/mismatch", "above", 0.1, "warn", "engine and trainer disagree"),
    Rail("broken-engine", "learn/mismatch", "above", 1.0, "stop", "engine and trainer disagree"),
    Rail("entropy", "rl/surprise", "below", 0.01, "warn", "all answers of a group are one"),
    Rail("noise", "rl/surprise", "growth", 3.0, "warn", "the policy dissolves"),
    Rail("update", "learn/update_rms", "growth", 10.0, "warn", "steps grow"),
    Rail("clip", "learn/clipped_heads", "growth", 10.0, "warn", "attention logits grow"),
    Rail("length", "rl/tokens/*", "growth", 3.0, "warn", "answers grow without a bound"),
    Rail("truncated", "rl/truncated/*", "above", 0.5, "warn", "most answers are cut; more budget"),
    Rail("dead", "rl/dead_groups", "above", 0.9, "warn", "tasks are too easy or too hard"),
    Rail("repeating", "rl/repeating", "above", 0.3, "warn", "answers repeat themselves"),
    Rail("failed", "rl/failed_share", "above", 0.2, "warn", "environments or the engine fail"),
)


@dataclass(frozen=True)
class Alarm:
    """A metric beyond its rail."""

    iteration: int
    """From 0 on; a run's lines and pages count from 1."""
    rail: Rail
    metric: str
    value: float
    """The median of the window, or the last value where the rail is an absolute bound."""
    limit: float

    def __str__(self) -> str:
        side = "under" if self.rail.kind in ("below", "fall") else "over"
        return (
            f"iteration {self.iteration + 1}: {self.metric} is {self.value:.4g}, {side} "
            f"{self.limit:.4g} (--rail {self.rail.name}): {self.rail.says}"
        )


def rails_from(given: Sequence[str]) -> tuple[Rail, ...]:
    """The rails of a run.

    Args:
        given: ``NAME=BOUND``, ``NAME=BOUND:warn``, ``NAME=BOUND:stop`` or ``NAME=off`` each.

    Raises:
        UserError: no such rail, or a bound that is no number.
    """
    found = {rail.name: rail for rail in RAILS}
    for text in given:
        name, is_given, rest = text.partition("=")
        if name not in {rail.name for rail in RAILS} or not is_given:
            names = ", ".join(rail.name for rail in RAILS)
            raise UserError(f"--rail {text}: expected NAME=BOUND with a name of {names}")
        if rest == "off":
            found.pop(name, None)
            continue
        bound, _, action = rest.partition(":")
        try:
            value = float(bound)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or action not in ("", "warn", "stop"):
            raise UserError(f"--rail {text}: expected {name}=BOUND, a number, or BOUND:warn|stop")
        rail = next(rail for rail in RAILS if rail.name == name)
        kept: Action = "stop" if (action or rail.action) == "stop" else "warn"
        found[name] = replace(rail, bound=value, action=kept)
    return tuple(found.values())


def alarms(
    iteration: int, metrics: Metrics, before: Sequence[Metrics], rails: Sequence[Rail] = RAILS
) -> list[Alarm]:
    """What an iteration's metrics set off.

    Args:
        iteration: its number.
        metrics: of it.
        before: of every iteration before it, oldest first.
        rails: of the run.
    """
    found = []
    for rail in rails:
        for name, value in metrics.items():
            if fnmatch.fnmatchcase(name, rail.metric):
                alarm = _alarm(iteration, rail, name, value, before)
                found += [] if alarm is None else [alarm]
    return found


def _alarm(
    iteration: int, rail: Rail, name: str, value: float, before: Sequence[Metrics]
) -> Alarm | None:
    if not math.isfinite(value):
        return Alarm(iteration, rail, name, value, rail.bound)
    if rail.kind in ("above", "below"):
        is_beyond = value > rail.bound if rail.kind == "above" else value < rail.bound
        return Alarm(iteration, rail, name, value, rail.bound) if is_beyond else None
    values = [each[name] for each in before if name in each and math.isfinite(each[name])]
    medians = _medians([*values, value])
    if len(medians) < 2:
        return None
    now = medians[-1]
    if rail.kind == "fall":
        limit = max(medians) - rail.bound
        is_beyond = now < limit
    else:
        limit = medians[0] * rail.bound
        is_beyond = 0 < limit < now
    return Alarm(iteration, rail, name, now, limit) if is_beyond else None


def _medians(values: Sequence[float]) -> list[float]:
    """Of each window of ``WINDOW`` neighbours; none of fewer."""
    return [statistics.median(values[end - WINDOW : end]) for end in range(WINDOW, len(values) + 1)]
