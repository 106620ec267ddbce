"""Every benchmark that can run small runs, and ends in its result line; no figure is judged."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import REPOSITORY

SMALL = {
    "activation_fp8": "--rows 64 --width 256 --rounds 1 --dtype bfloat16",
    "newton_schulz": "--shapes 64x128 --rounds 1 --threads 1",
    "optimizer_step": "--divisor 64 --rounds 1 --ranks 1 --precisions bf16",
    "rl_iteration": "--quick",
    "sandbox": "--backend bare --programs 4 --rounds 1 --alive 5",
    "verifiers": "--number 8 --leave-out coding mathematics mix",
    "sft_data": "--dialogues 3 --rounds 1 --samples 1000",
    "sft_step": "--samples 8 --rows 256 --rounds 1",
    "weight_update": "--preset k2-tiny --rounds 1",
    "synthesis": "--number 300 --rounds 1",
    "train_step": "--batch 1 --seq 32 --rounds 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_ends_in_its_result_line(name):
    if name in ("rl_iteration", "sft_data", "sft_step", "train_step"):
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *SMALL[name].split()],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("RESULT ")
