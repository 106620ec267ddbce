"""One line an iteration, ``metrics.jsonl`` in a run's folder of RL: all of its metrics.

A run that went on from a checkpoint writes the iterations after it again; the last line of an
iteration is the one that counts, and a torn last line counts for nothing.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_k2.errors import UserError

METRICS = "metrics.jsonl"


class Row(NamedTuple):
    """One iteration."""

    iteration: int
    version: int
    """Of the weights that it was sampled by."""
    metrics: Mapping[str, float]
    position: Mapping[str, Any] = {}
    """Of the ledger behind it."""


class History:
    """What a run has shown so far; every rank may hold it, one writes.

    Args:
        folder: of the run's RL; ``None``: nothing is kept.
        up_to: iterations that the checkpoint holds; later ones are forgotten. ``None``: all stay.
        writes: whether this one keeps rows on disk.

    Raises:
        UserError: a line that is none, and is not the last.
    """

    def __init__(
        self, folder: Path | None, up_to: int | None = None, *, writes: bool = True
    ) -> None:
        self._path = folder / METRICS if folder and writes else None
        rows = {row.iteration: row for row in (read_history(folder) if folder else [])}
        self._rows = {n: row for n, row in rows.items() if up_to is None or n < up_to}

    @property
    def before(self) -> list[Mapping[str, float]]:
        """Metrics of all iterations, oldest first."""
        return [self._rows[number].metrics for number in sorted(self._rows)]

    @property
    def rows(self) -> list[Row]:
        """The same, with their numbers."""
        return [self._rows[number] for number in sorted(self._rows)]

    def add(self, row: Row) -> None:
        """Keep an iteration; on disk when this returns, where this one writes."""
        self._rows[row.iteration] = row
        if self._path is None:
            return
        finite = {name: value for name, value in row.metrics.items() if math.isfinite(value)}
        said = {**row._asdict(), "metrics": finite, "position": dict(row.position)}
        broken = {n: repr(value) for n, value in row.metrics.items() if not math.isfinite(value)}
        if broken:
            said["broken"] = broken
        torn = self._path.exists() and not _ends_well(self._path)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if torn else "") + json.dumps(said) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _ends_well(path: Path) -> bool:
    with path.open("rb") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return True
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def read_history(folder: Path) -> list[Row]:
    """Rows of a run, oldest first, one an iteration.

    Raises:
        UserError: a line that is none, and is not torn.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    found = {}
    lines = path.read_text("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            said = json.loads(line)
            broken = {name: float(text) for name, text in said.get("broken", {}).items()}
            metrics, number = said["metrics"] | broken, int(said["iteration"])
            found[number] = Row(number, int(said["version"]), metrics, said["position"])
        except (ValueError, KeyError, TypeError) as problem:
            if not line.startswith("{") or line.endswith("}"):
                raise UserError(f"{path}:{number}: not an iteration's metrics: {problem}") from None
    return [found[number] for number in sorted(found)]
