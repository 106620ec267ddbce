"""A page of trajectories: prompts, turns, rewards and evidence beside curves; one HTML file.

Nothing is built and nothing is fetched. Records are text from elsewhere: they stand in the page as
JSON, in which no ``<`` is left to end its place, and its script makes text of them, never markup.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError

_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*DATA*/"
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
    data = json.dumps({"title": title, "rows": kept, "curves": drawn}, ensure_ascii=False)
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return _TEMPLATE.read_text("utf-8").replace(_PLACE, safe)
