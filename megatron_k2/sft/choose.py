"""Which samples of which part make the set, and the list of the rows that do not.

The first of each content in input order is kept. That is decided here, over all parts, so it does
not depend on which worker was done first.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_k2.data.parts import SPLITS, Part
from megatron_k2.data.sources import SourceFile, is_validation
from megatron_k2.files import write_atomically
from megatron_k2.sft.rows import line_numbers
from megatron_k2.sft.tokenize import PartSamples, read_part


@dataclass(frozen=True, slots=True)
class At:
    """Where a row stands."""

    file: SourceFile
    place: int


@dataclass(frozen=True)
class LeftOut:
    """A row that is not in the set."""

    at: At
    kind: str
    reason: str
    same_as: At | None = None
    """Of a duplicate, the row that is kept."""


@dataclass(frozen=True)
class Chosen:
    """Which samples of every part go where."""

    parts: list[PartSamples]
    kept: list[dict[str, np.ndarray]]
    """Of each part, split -> numbers of its samples."""
    rejects: list[LeftOut]
    """In input order."""


def choose(parts: Sequence[Part], directory: Path) -> Chosen:
    """The first of each content in input order, by split; what is left out, and why."""
    first_of: dict[bytes, At] = {}
    chosen = Chosen([], [], [])
    for part in parts:
        found = read_part(part, directory)
        kept: dict[str, list[int]] = {split: [] for split in SPLITS}
        left_out = []
        for bad in found.rejects:
            at = At(part.spans[bad.span].file, bad.place)
            left_out.append((bad.span, LeftOut(at, bad.kind, bad.reason)))
        for index, (content, place) in enumerate(zip(found.hashes, found.places, strict=True)):
            key, span = content.tobytes(), part.spans[int(place[0])]
            at = At(span.file, int(place[1]))
            if key in first_of:
                twice = LeftOut(at, "duplicate", "the same dialogue", first_of[key])
                left_out.append((int(place[0]), twice))
                continue
            first_of[key] = at
            kept[SPLITS[is_validation(key.hex(), span.validation_fraction)]].append(index)
        left_out.sort(key=lambda pair: (pair[0], pair[1].at.place))
        chosen.parts.append(found)
        chosen.kept.append({split: np.array(n, dtype=np.int64) for split, n in kept.items()})
        chosen.rejects.extend(each for _, each in left_out)
    return chosen


def write_rejects(chosen: Chosen, path: Path) -> None:
    """A line for each row that is left out: file, line, kind, reason."""
    places: dict[SourceFile, list[int]] = {}
    for each in chosen.rejects:
        for at in (each.at, each.same_as):
            if at is not None:
                places.setdefault(at.file, []).append(at.place)
    numbers = {file: line_numbers(file, wanted) for file, wanted in places.items()}
    lines = []
    for each in chosen.rejects:
        line = numbers[each.at.file][each.at.place]
        reason = each.reason
        if each.same_as is not None:
            first = numbers[each.same_as.file][each.same_as.place]
            reason += f" as {each.same_as.file.name}:{first}"
        row = {"file": each.at.file.name, "line": line, "kind": each.kind, "reason": reason}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode("utf-8", "backslashreplace"))
