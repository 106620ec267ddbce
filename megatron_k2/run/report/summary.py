"""A finished (or running) run in a picture and a few lines, from its ``metrics.jsonl`` alone.

``finish`` is what the trainer calls at the end: it draws ``report.png`` and returns the text to
print. Validation losses are not here; Megatron writes them to its log and to TensorBoard only.
"""

import importlib.util
import math
import shlex
import statistics
from pathlib import Path

from megatron_k2.run.console import duration
from megatron_k2.run.metrics import (
    MAX_LOGITS_FILE,
    read_max_logits,
)
from megatron_k2.run.report.run import Run, read_run

REPORT_FILE = "report.png"
HEADS_FILE = "max_logits.png"


def summary(run_dir: Path) -> str:
    """What a person wants to know first about the run in ``run_dir``, in a few lines."""
    return summarise(read_run(run_dir))


def summarise(run: Run) -> str:
    """The lines of ``summary`` for a run that has been read already."""
    first, last = run.records[0], run.records[-1]
    finite = [record for record in run.records if math.isfinite(record.loss)]
    seconds = sum(record.seconds for record in run.records)
    speed = statistics.median(record.tokens_per_second for record in run.records)
    num_clipped = sum(record.num_clipped_heads for record in run.records)
    skipped = sum(record.is_skipped for record in run.records)
    lines = [
        f"steps      {last.iteration:,}"
        + (f" (recorded from {first.iteration:,})" if first.iteration > 1 else "")
        + (f", {skipped:,} skipped" if skipped else ""),
        f"tokens     {last.consumed_tokens:,}",
    ]
    if finite:
        best = min(finite, key=lambda record: record.loss)
        lines.append(
            f"loss       {finite[0].loss:.4f} -> {finite[-1].loss:.4f}, "
            f"best {best.loss:.4f} at step {best.iteration:,}"
        )
    else:
        lines.append("loss       never finite")
    threshold = "" if run.threshold is None else f" (threshold {run.threshold:g})"
    return "\n".join(
        [
            *lines,
            f"max logit  {last.max_logit:.2f} at the end{threshold}, "
            f"{num_clipped:,} head-steps clipped in all",
            f"speed      {speed:,.0f} tokens/s (median)",
            f"time       {duration(seconds)}",
        ]
    )


def next_commands(run: Run) -> list[str]:
    """What one does with a trained model, ready to paste."""
    directory = shlex.quote(str(run.directory))
    exported = shlex.quote(f"{run.directory}-hf")
    if run.is_fine_tuned:
        return [
            f"megatron-k2 chat --load {directory} --prompt 'Hello.'",
            f"megatron-k2 convert export {directory} {exported}",
            f"megatron-k2 report {directory}",
        ]
    data = "DATA_DIR" if run.data is None else shlex.quote(run.data)
    return [
        f"megatron-k2 evaluate --load {directory} --data {data}",
        f"megatron-k2 generate --load {directory} --data {data} --prompt 'def main('",
        f"megatron-k2 convert export {directory} {exported}",
        f"megatron-k2 report {directory}",
    ]


def write_report(run: Run, path: Path) -> None:
    """Draw ``run`` into the PNG file ``path``, which is whole or not there."""
    from megatron_k2.files import write_atomically
    from megatron_k2.run.report.figure import draw

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, draw(run))


def write_heads(run: Run) -> Path | None:
    """Draw every head's largest logit into the run's directory; None if none were recorded."""
    from megatron_k2.files import write_atomically
    from megatron_k2.run.report.heads import draw_heads

    recorded = read_max_logits(run.directory / MAX_LOGITS_FILE)
    if not recorded:
        return None
    steps, tables = zip(*recorded, strict=True)
    path = run.directory / HEADS_FILE
    write_atomically(path, draw_heads(list(steps), list(tables), run.threshold))
    return path


def finish(run_dir: Path) -> str:
    """Draw both pictures in ``run_dir``; the summary, their paths and what to do next."""
    run = read_run(run_dir)
    following = "\n".join(f"  {command}" for command in next_commands(run))
    return f"{summarise(run)}\nreport     {_pictures(run)}\n\nnext:\n{following}"


def _pictures(run: Run) -> str:
    """Their paths, or why there are none: a run that is done is not lost for a picture."""
    if importlib.util.find_spec("matplotlib") is None:
        return "not drawn, for which matplotlib is needed: pip install matplotlib, then report"
    path = run.directory / REPORT_FILE
    write_report(run, path)
    heads = write_heads(run)
    return f"{path}, {heads}" if heads else str(path)
