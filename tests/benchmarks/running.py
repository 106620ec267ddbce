"""Run a benchmark on a small input, as a user does."""

import os
import subprocess
import sys

from tests.support.paths import REPOSITORY


def benchmark_output(name: str, arguments: str) -> str:
    """What ``benchmarks/<name>.py ARGUMENTS`` prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments.split()],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
