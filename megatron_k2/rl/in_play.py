"""Groups between their draw and the iteration that trains on them, by where their answers lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.rl.curriculum import Prompt
from megatron_k2.rl.journal_reader import Ref
from megatron_k2.rl.scoring import Score


@dataclass
class OpenGroup:
    """A prompt that was drawn and not trained on yet."""

    prompt: Prompt
    answers: dict[int, Ref] = field(default_factory=dict)
    """Those that earlier iterations finished, by k."""
    states: dict[int, Ref] = field(default_factory=dict)
    """Beginnings of those that earlier iterations cut off, by k."""

    def to_object(self) -> dict[str, Any]:
        """JSON."""
        return {**vars(self), "prompt": dict(vars(self.prompt))}


def open_group_from(row: Mapping[str, Any]) -> OpenGroup:
    """An object, back."""
    answers, states = (
        {int(k): Ref(*ref) for k, ref in row[name].items()} for name in ("answers", "states")
    )
    return OpenGroup(Prompt(**row["prompt"]), answers, states)


@dataclass(frozen=True)
class FinishedGroup:
    """A group at the cut that trains on it."""

    prompt: Prompt
    answers: tuple[Ref, ...]
    scores: tuple[Score, ...]
    verdicts: tuple[float | None, ...]
    lengths: tuple[int, ...]
    num_format_errors: int

    def to_object(self) -> dict[str, Any]:
        """JSON."""
        return {**vars(self), "prompt": dict(vars(self.prompt))}


@dataclass(frozen=True)
class Finished:
    """An answer that the iteration under way has finished."""

    num_steps: int
    """Tokens that it drew in this iteration."""
    ref: Ref
