"""One pack as rows: what is read, what is asked for, and what is known of what is asked for."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_k2.errors import UserError
from megatron_k2.model.packed import PackLayout, lay_out
from megatron_k2.rl.batch import Answer, Room, Source, is_kept
from megatron_k2.sft.dataset import Pack, PackShape, rows_of


@dataclass(frozen=True)
class Rows:
    """One pack, whole, on the host; arrays are [s] unless said otherwise.

    What is said of a row's label, the token that it is asked for, is 0 where there is none.
    """

    layout: PackLayout
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    sample: NDArray[np.int64]
    """Answer of the pack that the label is part of, from 0."""
    is_trained: NDArray[np.bool_]
    """In the answer's mask."""
    is_current: NDArray[np.bool_]
    """Drawn by the weights that are pi_old, so that the engine's number and the trainer's are of
    one model."""
    temperature: NDArray[np.float32]
    """It was drawn at; 1 elsewhere."""
    behaviour: NDArray[np.float32]
    """The engine's log-probability of it, at temperature 1."""
    nll_weight: NDArray[np.float32]
    """Of the PTX term."""
    lesson_weight: NDArray[np.float32]
    """Of the critic's term."""
    routes: NDArray[np.int16] | None
    """[s, MoE layers, top-k]: experts of the token that is read; -1 where none were recorded.
    ``None``: of the whole pack none."""
    advantage: NDArray[np.float32]
    """[answers of the pack]"""
    weight: NDArray[np.float32]
    """[answers]"""
    lengths: NDArray[np.int64]
    """[answers] tokens in the mask."""


_BLANK = {
    "tokens": np.int64,
    "labels": np.int64,
    "sample": np.int64,
    "is_trained": np.bool_,
    "is_current": np.bool_,
    "behaviour": np.float32,
    "nll_weight": np.float32,
    "lesson_weight": np.float32,
}


def rows(source: Source, room: Room, version: int, *, keeps_old: bool = False) -> Rows:
    """A pack's rows.

    Args:
        source: what it holds.
        room: as in ``plan``.
        version: as in ``plan``.
        keeps_old: as in ``plan``.

    Raises:
        UserError: routes of two shapes.
    """
    if source.dialogues is not None:
        term = "lesson_weight" if source.is_lesson else "nll_weight"
        return _dialogue_rows(source.dialogues, room, term)
    spans = _spans(source)
    lengths = [span.stop - span.start for span in spans]
    layout = lay_out(lengths, room.num_rows, room.multiple, [span.goes_on_from for span in spans])
    found: dict[str, Any] = {name: np.zeros(room.num_rows, dtype) for name, dtype in _BLANK.items()}
    found["temperature"] = np.ones(room.num_rows, np.float32)
    found["routes"] = _blank_routes(source.answers, room.num_rows)
    columns = [_columns(each, version, found["routes"], keeps_old) for each in source.answers]
    for span, start in zip(spans, layout.bounds, strict=False):
        here = slice(start, start + span.stop - span.start)
        found["sample"][here] = span.answer
        for name, values in columns[span.answer].items():
            found[name][here] = values[span.start : span.stop]
    return Rows(
        layout=layout,
        position_ids=layout.positions(),
        advantage=np.array([each.advantage for each in source.answers], np.float32),
        weight=np.array([each.weight for each in source.answers], np.float32),
        lengths=np.array([each.num_trained for each in source.answers], np.int64),
        **found,
    )


class _Span(NamedTuple):
    """A document of a pack: rows [start, stop) of an answer's own."""

    answer: int
    start: int
    stop: int
    goes_on_from: int
    """The document that it goes on from, -1 for none."""


def _spans(source: Source) -> list[_Span]:
    """Documents: of answers that share rows those first, then what each has of its own."""
    found: list[_Span] = []
    number = 0
    for bundle in source.bundles:
        shared, at = bundle.num_shared, len(found) if bundle.num_shared else -1
        if shared:
            found.append(_Span(number, 0, shared, -1))
        for answer in bundle.answers:
            found.append(_Span(number, shared, len(answer.trajectory.token_ids) - 1, at))
            number += 1
    return found


def _columns(
    answer: Answer, version: int, blank: NDArray[np.int16] | None, keeps_old: bool
) -> dict[str, NDArray[Any]]:
    """What is known of the rows of one answer, [tokens - 1] each."""
    tokens = np.array(answer.trajectory.token_ids)
    size = len(tokens) - 1
    names = ("is_trained", "is_current", "behaviour")
    found: dict[str, Any] = {name: np.zeros(size, _BLANK[name]) for name in names}
    found |= {"tokens": tokens[:-1], "labels": tokens[1:], "temperature": np.ones(size, np.float32)}
    if blank is not None:
        found["routes"] = np.full((size, *blank.shape[1:]), -1, np.int16)
    at = -1  # of the row that is asked for the segment's first token
    for segment in answer.trajectory.segments:
        asked = slice(at, at + len(segment.token_ids))
        if segment.is_sampled:
            found["is_trained"][asked] = is_kept(segment, version, keeps_old)
            found["is_current"][asked] = segment.weight_version == version
            found["behaviour"][asked] = segment.logprobs
            found["temperature"][asked] = segment.temperature
        if blank is not None and segment.routes:
            count = min(len(segment.routes), size - (at + 1))
            found["routes"][at + 1 : at + 1 + count] = segment.routes[:count].array
        at += len(segment.token_ids)
    return found


def _blank_routes(answers: tuple[Answer, ...], num_rows: int) -> NDArray[np.int16] | None:
    shapes = {
        (segment.routes.num_layers, segment.routes.top_k)
        for each in answers
        for segment in each.trajectory.segments
        if segment.routes
    }
    if len(shapes) > 1:
        raise UserError(f"routes of {sorted(shapes)} MoE layers and experts in one pack")
    return np.full((num_rows, *shapes.pop()), -1, np.int16) if shapes else None


def _dialogue_rows(dialogues: Pack, room: Room, term: str) -> Rows:
    """A pack as ``sft.dataset`` lays it out, its weights under ``term``."""
    parts = rows_of(dialogues, PackShape(room.num_rows, room.multiple))
    found: dict[str, Any] = {name: np.zeros(room.num_rows, dtype) for name, dtype in _BLANK.items()}
    found |= {name: parts[name].numpy() for name in ("tokens", "labels")}
    found[term] = parts["loss_mask"].numpy()
    return Rows(
        layout=PackLayout(tuple(parts["lengths"].tolist()), tuple(parts["cu_seqlens"].tolist())),
        position_ids=parts["position_ids"].numpy(),
        temperature=np.ones(room.num_rows, np.float32),
        routes=None,
        advantage=np.zeros(0, np.float32),
        weight=np.zeros(0, np.float32),
        lengths=np.zeros(0, np.int64),
        **found,
    )
