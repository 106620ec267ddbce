"""The benchmark runs on a small shape and ends in its result line. Its figures are not judged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_benchmark_prints_inputs_ceiling_and_result():
    arguments = "--shapes 64x128 --rounds 1 --threads 1 --seed 3".split()
    done = subprocess.run(
        [sys.executable, "benchmarks/newton_schulz.py", *arguments],
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
    assert any("load_average=" in line for line in lines)
    assert any(line.startswith("ceiling: ") for line in lines)
    assert lines[-1].startswith("RESULT 64x128_error_ratio=")
