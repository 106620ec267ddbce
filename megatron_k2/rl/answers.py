"""A finished answer as the ledger keeps it: its tokens, how it ended, what the gym said of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.records.rollouts import End
from megatron_k2.rl.record import Segment, segment_from


@dataclass(frozen=True)
class Answer:
    """Before rewards: those of a group hang on one another."""

    segments: tuple[Segment, ...]
    end: End
    verdict: float | None
    """The gym's reward, 0 to 1; ``None``: nothing is known."""
    evidence: str = ""
    """What the verdict rests on."""
    reason: str = ""
    """What happened, where it did not end by itself."""
    num_format_errors: int = 0
    """Turns that are not what K2 writes."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy wrote."""
        return sum(len(each.token_ids) for each in self.segments if each.is_sampled)

    def to_object(self) -> dict[str, Any]:
        """JSON."""
        return {**vars(self), "segments": segments_to_object(self.segments)}


def segments_to_object(segments: tuple[Segment, ...]) -> list[dict[str, Any]]:
    """JSON."""
    return [dict(vars(segment)) for segment in segments]


def answer_from(row: Mapping[str, Any]) -> Answer:
    """An object, back."""
    segments = tuple(segment_from(each) for each in row["segments"])
    return Answer(**{**row, "segments": segments, "end": End(row["end"])})
