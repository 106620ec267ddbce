"""Pages of records, one HTML file each: trajectories beside curves, and texts side by side.

Nothing is built and nothing is fetched. Records are text from elsewhere: they stand in the page as
JSON, in which no ``<`` is left to end its place, and its script makes text of them, never markup.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError

_TRAJECTORIES, _COMPARISON = "page.html", "comparison.html"
_PLACE = "/*DATA*/"
_SHARED, _SCRIPT = "/*SHARED*/", "shared.js"
"""Where a page takes what all of them have, and the file of it."""
NEEDED = ("messages", "outcome", "reward", "end", "domain", "task_id")


def trajectories_page(
    title: str,
    rows: Iterable[Mapping[str, Any]],
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> str:
    """The page, whole.

    Args:
        title: of it.
        rows: trajectories as ``Rollout.to_object`` gives them; ``iteration``, where rows have it,
            can be chosen by.
        curves: by name, points of x and y; those that are not finite are left out.

    Raises:
        UserError: a row lacks a field.
    """
    kept = []
    for number, row in enumerate(rows):
        if missing := [name for name in NEEDED if name not in row]:
            raise UserError(f"trajectory {number} has no {missing[0]!r}; expected a rollout's line")
        kept.append({name: value for name, value in row.items() if name != "sampled"})
    drawn = []
    for name, points in (curves or {}).items():
        finite = [list(point) for point in points if all(map(math.isfinite, point))]
        if finite:
            drawn.append({"name": name, "points": finite})
    return _page(_TRAJECTORIES, {"title": title, "rows": kept, "curves": drawn})


def comparison_page(
    title: str,
    rows: Iterable[Mapping[str, Any]],
    tables: Iterable[tuple[str, Sequence[Sequence[str]]]] = (),
    sides: tuple[str, str] = ("source", "rewrite"),
) -> str:
    """Two texts side by side, many times.

    Args:
        title: of the page.
        rows: with ``left``, ``right``, ``group`` (to choose by), ``is_good``, ``said`` (a sentence)
            and ``facts`` (names and values).
        tables: a title and rows of cells each, of which the first is a heading.
        sides: what stands over the texts.
    """
    listed = [{"title": name, "rows": [list(row) for row in cells]} for name, cells in tables]
    found = {"title": title, "sides": list(sides), "tables": listed, "rows": list(rows)}
    return _page(_COMPARISON, found)


def _page(template: str, data: Mapping[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False)
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    here = Path(__file__)
    page, script = (here.with_name(name).read_text("utf-8") for name in (template, _SCRIPT))
    return page.replace(_SHARED, script).replace(_PLACE, safe)
