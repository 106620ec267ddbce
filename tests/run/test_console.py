"""The one line a person sees, and where everything else goes."""

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_k2.run.console import duration, step_line
from tests.run.test_metrics import RECORD


def test_the_line_shows_step_loss_rate_speed_logit_load_and_eta():
    record = replace(RECORD, iteration=20, loss=7.01234, learning_rate=2e-4)
    record = replace(record, tokens_per_second=8126.6, max_logit_per_layer=(3.0, 19.996))
    assert step_line(record, 500, 0.5) == (
        "step  20/500 | loss  7.0123 | lr 2.00e-04 |    8127 tok/s"
        " | max logit   20.00 (clipped 2) | expert load 1.25x | eta 4:00"
    )


def test_a_skipped_step_without_a_token_says_so_in_place_of_nan():
    record = replace(RECORD, iteration=20, loss=float("nan"))
    skipped = step_line(replace(record, is_skipped=True), 500, 0.5)
    assert " | loss skipped | lr " in skipped
    assert "nan" not in skipped
    assert " | loss     nan | " in step_line(replace(record, is_skipped=False), 500, 0.5)
    assert len(skipped) == len(step_line(replace(RECORD, iteration=20), 500, 0.5))


def test_columns_stay_where_they_are_as_numbers_grow():
    lines = [
        step_line(replace(RECORD, iteration=i, loss=loss, max_logit_per_layer=(logit,)), 5000, 0.1)
        for i, loss, logit in [(1, 12.5, 3.0), (999, 0.25, 1234.5), (4999, 3.125, 99.99)]
    ]
    bars = {tuple(i for i, c in enumerate(line) if c == "|") for line in lines}
    assert len(bars) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_diverted_output_of_python_and_of_the_process_goes_to_the_log_only(tmp_path):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from megatron_k2.run.console import divert_output\n"
        f"terminal = divert_output(Path({str(tmp_path / 'logs' / 'rank0.log')!r}))\n"
        "print('python')\n"
        "print('error', file=sys.stderr, flush=True)\n"
        "os.write(1, b'library\\n')\n"
        "print('ours', file=terminal)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("ours\n", "")
    assert sorted((tmp_path / "logs" / "rank0.log").read_text().split()) == [
        "error",
        "library",
        "python",
    ]
