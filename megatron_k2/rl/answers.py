"""A finished answer as the ledger keeps it: its tokens, how it ended, what the gym said of it.

Routes lie as bytes beside the JSON, which names for each segment how many are its own: as text in
it K2's took 52 ms a thousand tokens.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.records.rollouts import End
from megatron_k2.records.routes import Routes
from megatron_k2.rl.journal_reader import Payload
from megatron_k2.rl.record import Segment


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

    def to_payload(self) -> Payload:
        """For a journal."""
        rows, raw = _packed(self.segments)
        return Payload({**vars(self), "segments": rows}, raw)


def answer_from(payload: Payload) -> Answer:
    """What ``to_payload`` gave, back."""
    row, raw = payload
    segments = _unpacked(row["segments"], raw)
    return Answer(**{**row, "segments": segments, "end": End(row["end"])})


def segments_to_payload(segments: Sequence[Segment]) -> Payload:
    """An answer's beginning, for a journal."""
    return Payload(*_packed(segments))


def segments_from(payload: Payload) -> tuple[Segment, ...]:
    """What ``segments_to_payload`` gave, back."""
    return _unpacked(*payload)


def _packed(segments: Sequence[Segment]) -> tuple[list[dict[str, Any]], bytes]:
    every = [segment.routes for segment in segments]
    shapes = [[len(each.experts), each.num_layers, each.top_k] for each in every]
    rows = [{**vars(s), "routes": shape} for s, shape in zip(segments, shapes, strict=True)]
    return rows, b"".join(each.experts for each in every)


def _unpacked(rows: Sequence[dict[str, Any]], raw: bytes) -> tuple[Segment, ...]:
    found, stream = [], io.BytesIO(raw)
    for row in rows:
        size, num_layers, top_k = row["routes"]
        fields = {
            **row,
            "token_ids": tuple(row["token_ids"]),
            "logprobs": tuple(row["logprobs"]),
            "routes": Routes(stream.read(size), num_layers, top_k),
        }
        found.append(Segment(**fields))
    return tuple(found)
