"""The script of RL with engines executed by a real Slurm: its steps, their deaths, the same bits.

Two supervisors with an engine server each, a gym service, a controller and four gloo ranks share
one node of a private Slurm, so supervisors are two tasks of it. What a run of three iterations ends
with is compared with the same recipe run here with the embedded engine. Not exercised: several
nodes, a heterogeneous job, GPUs.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.cli.main import main
from megatron_k2.launch.jobs import jobs_of, states
from megatron_k2.run.iterations import last_iteration
from tests.campaigns.rl_sigkill import differ
from tests.slurm.cluster import LOW, missing, private_cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
RECIPE = "kimi_k2_rl_cluster_cpu"
RANKS = 4


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    with private_cluster(tmp_path_factory.mktemp("slurm"), num_cpus=RANKS) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("site") / "site.yaml"
    path.write_text(
        f"partition: {LOW}\ntime: '00:30:00'\nseconds_to_save: 60\npython: {sys.executable}\n"
        "environment: {OMP_NUM_THREADS: '1'}\n"
    )
    return path


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    save = tmp_path_factory.mktemp("alone") / "run"
    _launch(save, data, "--executor", "local")
    assert last_iteration(save) == 3
    return save


def _launch(save, data, *more):
    words = ["launch", RECIPE, "--save", str(save), "--set", f"data.root={data}"]
    assert main([*words, *more]) == 0


def _whole_log(save):
    path = Path(save) / "slurm" / f"{jobs_of(str(save))[-1].number}.log"
    return path.read_text() if path.exists() else "no log"


def _log(save):
    return _whole_log(save)[-6000:]


def _until(save, is_so, seconds=600):
    deadline = time.monotonic() + seconds
    while not is_so():
        state = states([jobs_of(str(save))[-1]]).get(jobs_of(str(save))[-1].number)
        assert state is None or state.name not in ("FAILED", "CANCELLED"), _log(save)
        assert time.monotonic() < deadline, (state, _log(save))
        time.sleep(0.2)


def _is_completed(save):
    job = jobs_of(str(save))[-1]
    state = states([job]).get(job.number)
    return state is not None and state.name == "COMPLETED"


def _pids(words, save):
    """Of processes whose command has ``words``, and this run's directory or meeting in it."""
    pattern = f"megatron_k2.{words} .*{save}"
    found = subprocess.run(["pgrep", "--full", pattern], capture_output=True, text=True)
    own = [int(pid) for pid in found.stdout.split()]
    return [pid for pid in own if _executable(pid).startswith(("python", "pt_"))]


def _executable(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _kill(words, save):
    pids = []
    _until(save, lambda: pids.extend(_pids(words, save)) or pids)
    os.kill(pids[-1], signal.SIGKILL)


def test_the_rendered_script_trains_to_the_bits_of_the_run_here(alone, data, profile, tmp_path):
    save = tmp_path / "a run's directory"
    _launch(save, data, "--profile", str(profile))
    _until(save, lambda: _is_completed(save))
    assert differ(save, alone) == "", _log(save)
    log = _whole_log(save)
    assert "done: 3 steps" in log
    assert "4 ranks agree" in log, "the nodes were looked at first"
    steps = {path.stem for path in (save / "rl" / "rendezvous").glob("*.0/*.step")}
    assert steps == {"check", "trainer", "supervisor", "gym", "controller"}
    assert not _pids("rl.cluster", save), "everything has ended with the trainer"


def test_a_killed_rank_queues_the_job_again_and_services_heal_in_place(
    alone, data, profile, tmp_path
):
    save = tmp_path / "run"
    _launch(save, data, "--profile", str(profile))
    _until(save, lambda: last_iteration(save) >= 1)
    _kill("rl.cluster.supervisor", save)
    _kill("rl.cluster.gym_service", save)
    _until(save, lambda: last_iteration(save) >= 2)
    _kill("rl.train", save)
    _until(save, lambda: _is_completed(save))
    assert differ(save, alone) == "", _log(save)
    log = _whole_log(save)
    for name in ("supervisor", "gym"):
        assert re.search(rf"^{name} \d ended with 137: started again$", log, re.MULTILINE), log
    assert "queued again" in log
    generations = sorted(path.name[-1] for path in (save / "rl" / "rendezvous").iterdir())
    assert generations == ["0", "1"], "the job was started twice"


def test_near_the_time_limit_the_trainer_saves_and_the_job_goes_on(alone, data, profile, tmp_path):
    """What ``--signal=B:USR1`` sends, sent by hand."""
    save = tmp_path / "run"
    _launch(save, data, "--profile", str(profile))
    _until(save, lambda: last_iteration(save) >= 1)
    job = jobs_of(str(save))[-1].number
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    _until(save, lambda: _is_completed(save))
    assert differ(save, alone) == "", _log(save)
    assert "queued again" in _whole_log(save)
