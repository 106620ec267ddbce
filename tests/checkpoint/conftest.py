import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Directory with one torch_dist checkpoint per layout, made once by two gloo ranks."""
    out = tmp_path_factory.mktemp("megatron")
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("build_checkpoints.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out
