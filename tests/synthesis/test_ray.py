"""Shards as tasks of a Ray that is started here: the same bytes, a killed worker included.

Without Ray the sentence that says so; `make test-ray` has one. Clusters of several machines are not
exercised.
"""

import importlib.util
import os
import signal
import threading
import time

import psutil
import pytest

from megatron_k2.errors import UserError
from megatron_k2.synthesis.work.ray_engine import run_on_ray
from tests.support.paths import REPOSITORY
from tests.synthesis.running import begun, merged, run, teacher

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def kill_a_task(folder, when, killed):
    """SIGKILL the first of Ray's workers that works on this test's folder."""
    while not when():
        time.sleep(0.05)
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if str(folder) in (process.info["cmdline"] or ()):
            os.kill(process.info["ppid"], signal.SIGKILL)
            killed.append(process.info["ppid"])
            return


@pytest.mark.skipif(not HAS_RAY, reason="make test-ray has it")
@pytest.mark.slow
def test_ray_makes_the_same_bytes_with_a_task_killed(tmp_path):
    number = 400
    with teacher(echo=True) as (url, _):
        whole = run(tmp_path / "local", url, number)
    with teacher(echo=True, delay=0.1) as (url, counts):
        job = begun(tmp_path / "ray", url, number, num_shards=2)
        killed = []
        killing = threading.Thread(
            target=kill_a_task,
            args=(tmp_path / "ray", lambda: counts().get("answered", 0) > 40, killed),
        )
        killing.start()
        assert run_on_ray(tmp_path / "ray", job, 8)
        killing.join()
        assert killed
        assert merged(tmp_path / "ray", job) == whole


@pytest.mark.skipif(HAS_RAY, reason="it is installed")
def test_without_ray_there_is_a_sentence(tmp_path):
    job = begun(tmp_path, "http://127.0.0.1:9", 3)
    with pytest.raises(UserError, match=r"megatron-k2\[ray\]"):
        run_on_ray(tmp_path, job, 4)
