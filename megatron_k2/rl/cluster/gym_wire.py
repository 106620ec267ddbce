"""What passes between an environment's service and its client: tasks, steps, verdicts as JSON."""

from collections.abc import Mapping
from typing import Any

from megatron_k2.gym.protocol import Outcome, Step, Verdict
from megatron_k2.records.read import message_from


def step_object(step: Step) -> dict[str, Any]:
    """JSON."""
    return {"messages": [each.to_object() for each in step.messages], "is_over": step.is_over}


def step_from(row: Mapping[str, Any]) -> Step:
    """A step, back.

    Raises:
        ValueError: it is none.
    """
    try:
        messages = tuple(message_from(each) for each in row["messages"])
        return Step(messages, bool(row["is_over"]))
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"no step: {problem!r}") from None


def verdict_object(verdict: Verdict) -> dict[str, Any]:
    """JSON."""
    return {**vars(verdict), "outcome": verdict.outcome.value, "details": dict(verdict.details)}


def verdict_from(row: Mapping[str, Any]) -> Verdict:
    """A verdict, back.

    Raises:
        ValueError: it is none.
    """
    try:
        outcome = Outcome(row["outcome"])
        return Verdict(outcome, str(row["evidence"]), dict(row["details"]), float(row["seconds"]))
    except (KeyError, TypeError) as problem:
        raise ValueError(f"no verdict: {problem!r}") from None
