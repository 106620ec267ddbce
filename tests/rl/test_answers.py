"""Answers as payloads and back: each segment gets its own routes, and those without get none."""

import pytest

from megatron_k2.records.rollouts import End
from megatron_k2.records.routes import Routes
from megatron_k2.rl.answers import Answer, answer_from, segments_from, segments_to_payload
from megatron_k2.rl.journal_reader import Payload
from megatron_k2.rl.record import Segment

SEGMENTS = (
    Segment((5, 6), routes=Routes.of([[[0, 1]], [[2, 383]]])),
    Segment((8, 9, 10), (-0.5, -1.25, -3.0), 3, 0.8, Routes.of([[[3, 1]], [[4, 5]], [[6, 7]]])),
    Segment((11,)),
    Segment((12, 13), (-0.1, -0.2), 4, 0.8, Routes.of([[[9, 8]]])),
)
ANSWER = Answer(SEGMENTS, End.OVER, 0.5, "two of four", num_format_errors=1)


def test_an_answer_comes_back() -> None:
    packed = ANSWER.to_payload().packed()
    assert answer_from(Payload.unpacked(packed)) == ANSWER
    assert packed.endswith(b"".join(each.routes.experts for each in SEGMENTS))


@pytest.mark.parametrize("count", range(5))
def test_a_beginning_comes_back(count: int) -> None:
    packed = segments_to_payload(SEGMENTS[:count]).packed()
    assert segments_from(Payload.unpacked(packed)) == SEGMENTS[:count]


def test_routes_that_are_not_all_there_are_not_made_up() -> None:
    """The wrong variant: a byte is missing of the last."""
    content, raw = ANSWER.to_payload()
    with pytest.raises(ValueError, match="3 bytes of routes"):
        answer_from(Payload(content, raw[:-1]))
