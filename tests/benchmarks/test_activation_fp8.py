"""The benchmark runs on a small matrix and ends in its result line. Its figures are not judged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_benchmark_checks_the_bytes_and_prints_floor_and_result():
    arguments = "--rows 64 --width 256 --rounds 1 --dtype bfloat16 --seed 3".split()
    done = subprocess.run(
        [sys.executable, "benchmarks/activation_fp8.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "seed=3" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("RESULT floor_gbps=")
