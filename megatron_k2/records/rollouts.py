"""A trajectory as it lies between what plays it and what trains on it: ``Rollout``, a JSON line.

Messages are what a person reads; ``Sampled`` is what a trainer needs of each turn, where the policy
was an engine that gives it. A reward that is ``None`` is to be masked: nothing is known of the
answer, whatever the reason.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_k2.records.messages import Message, ToolSpec
from megatron_k2.records.read import message_from, tools_from

SCHEMA_VERSION = 1


class End(StrEnum):
    """Why a trajectory went no further."""

    OVER = "over"
    """The environment said so."""
    TURNS = "turns"
    """The policy took all turns it had."""
    TOKENS = "tokens"
    """It took all tokens it had."""
    DEADLINE = "deadline"
    """The trajectory's time was up."""
    POLICY = "policy"
    """The policy failed, or gave what is no action."""
    ENVIRONMENT = "environment"
    """The environment failed or was late, after all tries."""
    CANCELLED = "cancelled"
    """Somebody asked."""


JUDGED = frozenset({End.OVER, End.TURNS, End.TOKENS})
"""Ends that are the policy's own doing, and are judged. Others say nothing of its answer."""


@dataclass(frozen=True)
class Sampled:
    """What an engine drew for one action.

    Raises:
        ValueError: log-probabilities or versions that are not one a token, or are no numbers.
    """

    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...] = ()
    """All that the engine read before them."""
    logprobs: tuple[float, ...] = ()
    """Natural logarithms at temperature 1, one a token; empty where the engine gives none."""
    weight_versions: tuple[str, ...] = ()
    """Of the weights that drew each token; empty where they are not known."""

    def __post_init__(self) -> None:
        for name in ("logprobs", "weight_versions"):
            number = len(getattr(self, name))
            if number not in (0, len(self.token_ids)):
                raise ValueError(
                    f"{number} {name} for {len(self.token_ids)} tokens; expected one each, or none"
                )
        if not all(math.isfinite(value) for value in self.logprobs):
            raise ValueError("a log-probability that is not finite; leave all out or give numbers")

    def to_object(self) -> dict[str, Any]:
        """Its part of a line."""
        return {name: list(values) for name, values in vars(self).items()}


@dataclass(frozen=True)
class Rollout:
    """One trajectory of one task.

    Raises:
        ValueError: not one entry of ``sampled`` for each action.
    """

    task_id: str
    domain: str
    messages: tuple[Message, ...]
    """All: what the environment said, and the policy's actions, in order."""
    end: End
    outcome: str
    """*right*, *wrong*, *unknown*."""
    reward: float | None
    evidence: str = ""
    """What the verdict rests on."""
    reason: str = ""
    """What happened, in words, where ``end`` is not *over*."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Of the verdict, JSON."""
    tools: tuple[ToolSpec, ...] = ()
    actions: tuple[int, ...] = ()
    """Places of the policy's actions among ``messages``."""
    sampled: tuple[Sampled | None, ...] = ()
    """One for each action; ``None`` where the policy gave no tokens."""
    retries: tuple[str, ...] = ()
    """What went wrong on the way and was tried again."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds in *policy*, *environment*, *verify*, and *total*, which leaves pauses out."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if len(self.sampled) != len(self.actions):
            raise ValueError(f"{len(self.sampled)} entries of sampled, {len(self.actions)} actions")

    @property
    def num_tokens(self) -> int:
        """That the policy drew."""
        return sum(len(each.token_ids) for each in self.sampled if each)

    def to_object(self) -> dict[str, Any]:
        """What stands on its line."""
        return {
            **vars(self),
            "messages": [message.to_object() for message in self.messages],
            "tools": [tool.value for tool in self.tools],
            "actions": list(self.actions),
            "sampled": [each and each.to_object() for each in self.sampled],
            "retries": list(self.retries),
            "details": dict(self.details),
            "seconds": dict(self.seconds),
        }

    def to_line(self) -> str:
        """One JSON line, its end included."""
        return json.dumps(self.to_object(), ensure_ascii=False) + "\n"


def rollout_from(row: Mapping[str, Any]) -> Rollout:
    """A line's object, back.

    Raises:
        ValueError: another schema version, a field that is missing, unknown or of another form.
    """
    if row.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema_version {row.get('schema_version')!r}; expected {SCHEMA_VERSION}")
    try:
        return Rollout(
            **{
                **row,
                "messages": tuple(message_from(each) for each in row["messages"]),
                "tools": tools_from(row.get("tools")),
                "end": End(row["end"]),
                "actions": tuple(row.get("actions", ())),
                "sampled": tuple(_sampled(each) for each in row.get("sampled", ())),
                "retries": tuple(row.get("retries", ())),
            }
        )
    except KeyError as name:
        raise ValueError(f"a rollout without {name}") from None
    except TypeError as problem:
        raise ValueError(f"not a rollout: {problem}") from None


def _sampled(row: Mapping[str, Any] | None) -> Sampled | None:
    return None if row is None else Sampled(**{name: tuple(row[name]) for name in row})
