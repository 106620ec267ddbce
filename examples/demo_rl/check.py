"""What RL made of the model: ``check.py RUN``; exit code 1 where the bar is not met."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from megatron_k2.rl.history import Row, read_history

LEAST_LIFT = 0.15
"""Of the mean held-out reward at temperature 1, over both task sets."""
_SHOWN = 120
"""Letters of an answer's end."""


def held_out(row: Row, kind: str) -> dict[str, float]:
    """By task set."""
    pattern = re.compile(rf"eval/(\w+)/{kind}")
    found = ((pattern.fullmatch(name), value) for name, value in row.metrics.items())
    return {match[1]: value for match, value in found if match}


def answers(page: Path) -> list[dict[str, Any]]:
    """Rows of the page of trajectories: those of the first iteration and of the last."""
    text = re.search(r'application/json">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert text is not None
    rows: list[dict[str, Any]] = json.loads(text[1])["rows"]
    return rows


def main(run: Path) -> int:
    """Print, and compare with the bar."""
    folder = run / "rl"
    rows = [row for row in read_history(folder) if held_out(row, "sampled")]
    first, last = rows[0], rows[-1]
    for kind in ("sampled", "greedy"):
        before, after = held_out(first, kind), held_out(last, kind)
        words = "temperature 1" if kind == "sampled" else "greedy"
        each = ", ".join(f"{n} {before[n]:.2f} -> {after[n]:.2f}" for n in before)
        print(f"held out, {words}: {each}")
    shown = answers(folder / "report.html")
    for number in sorted({row["iteration"] for row in shown}):
        print(f"iteration {number + 1}:")
        for domain in sorted(held_out(first, "sampled")):
            row = next(r for r in shown if r["iteration"] == number and r["domain"] == domain)
            said = "".join(m["content"] for m in row["messages"][1:]).replace("\n", " ")
            print(f"  {domain}, reward {row['reward']:g}: {said[-_SHOWN:]}")
    before, after = (held_out(row, "sampled").values() for row in (first, last))
    lift = sum(after) / len(after) - sum(before) / len(before)
    print(f"held-out reward at temperature 1: {lift:+.3f} (bar: +{LEAST_LIFT})")
    print(f"curves {folder / 'report.png'}, answers {folder / 'report.html'}")
    return 0 if lift >= LEAST_LIFT else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
