"""Read what the demo left behind and hold it against its bars; exit code 1 if one is not met."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_k2.run.metrics import METRICS_FILE, read_records
from megatron_k2.terminal import show, table

FORMAT_EXACT, EXACT = 0.95, 0.50
LAST_STEPS = 20
COLUMNS = {"run": "all weights", "adapters": "adapters, rank 16"}
"""Directory of a run -> heading."""


def read_answers(out: Path, run: str) -> dict[str, Any]:
    """What ``evaluate.py`` wrote of a run."""
    found: dict[str, Any] = json.loads((out / f"answers_{run}.json").read_text())
    return found


def losses_of(run: Path) -> tuple[int, float, float]:
    """Steps, loss of the first, mean of the last; no pack is seen twice, so each is of new ones."""
    losses = [record.loss for record in read_records(run / METRICS_FILE)]
    return len(losses), losses[0], statistics.fmean(losses[-LAST_STEPS:])


def show_columns(out: Path) -> None:
    """Full fine-tuning and adapters side by side."""
    listed = table("", *COLUMNS.values())
    rows: dict[str, list[str]] = {}
    for run in COLUMNS:
        steps, before, after = losses_of(out / run)
        answers = read_answers(out, run)
        held_out, other = answers["held_out"], answers["other_module"]
        for name, text in (
            ("steps", f"{steps}"),
            (f"loss of targets, first step -> last {LAST_STEPS}", f"{before:.3f} -> {after:.3f}"),
            ("held-out arguments: format, wanted call", _pair(held_out)),
            ("a module never trained on: format, wanted call", _pair(other)),
        ):
            rows.setdefault(name, []).append(text)
    for name, texts in rows.items():
        listed.add_row(name, *texts)
    show(listed)


def _pair(answers: dict[str, float]) -> str:
    return f"{answers['format']:.0%}, {answers['exact']:.0%}"


def main(out: Path) -> int:
    """Both columns, and whether full fine-tuning met its bars."""
    show_columns(out)
    held_out = read_answers(out, "run")["held_out"]
    bars = [
        ("calls in the exact format, held-out arguments", held_out["format"], FORMAT_EXACT),
        ("the wanted call, held-out arguments", held_out["exact"], EXACT),
    ]
    failed = False
    listed = table("bar, all weights", "measured", "wanted", "")
    for name, value, bound in bars:
        failed |= value < bound
        verdict = "ok" if value >= bound else "NOT MET"
        listed.add_row(name, f"{value:.0%}", f">= {bound:.0%}", verdict)
    show(listed)
    print(f"answers: {out}/answers_*.json; curves: {out / 'run' / 'report.png'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-sft")))
