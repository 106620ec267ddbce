"""The step benchmark starts both sides from the same model and ends in its result line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_sides_start_with_the_same_loss_and_the_result_line_is_last():
    pytest.importorskip("transformers")
    arguments = "--batch 1 --seq 32 --rounds 1 --seed 3".split()
    done = subprocess.run(
        [sys.executable, "benchmarks/train_step.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "seed=3" in done.stdout
    assert any(line.startswith("peer: transformers ") for line in lines)
    assert any(line.startswith("first loss: ") for line in lines)
    assert any(line.startswith("ceiling: ") for line in lines)
    assert lines[-1].startswith("RESULT forward_backward_ratio=")
