"""What a person sees while it trains: one line a log interval, everything else in a file."""

import math
import os
import sys
from pathlib import Path
from typing import TextIO

from megatron_k2.run.metrics import StepRecord


def divert_output(log_path: Path) -> TextIO:
    """Send this process's stdout and stderr, C libraries' included, to ``log_path``.

    Returns:
        The terminal (or whatever stdout was), for our own lines.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    log = log_path.open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    return terminal


def duration(seconds: float) -> str:
    """A time as people write it: 1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def step_line(record: StepRecord, last_iteration: int, seconds_per_step: float) -> str:
    """One line on one step; ``seconds_per_step`` is a recent mean, for the ETA."""
    remaining = (last_iteration - record.iteration) * seconds_per_step
    width = len(str(last_iteration))
    has_loss = math.isfinite(record.loss) or not record.is_skipped
    loss = f"{record.loss:7.4f}" if has_loss else "skipped"  # no token: its mean is no number
    return (
        f"step {record.iteration:>{width}}/{last_iteration}"
        f" | loss {loss}"
        f" | lr {record.learning_rate:.2e}"
        f" | {record.tokens_per_second:7.0f} tok/s"
        f" | max logit {record.max_logit:7.2f} (clipped {record.num_clipped_heads})"
        f" | expert load {record.load_max_over_mean:4.2f}x"
        f" | eta {duration(remaining)}"
    )
