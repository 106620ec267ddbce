"""CPU twins as two-task jobs on a real Slurm: killed, preempted, chained, each resumed exactly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.cli.main import main
from megatron_k2.launch.jobs import cancel, follow, jobs_of, states
from megatron_k2.recipes import CHAINS
from megatron_k2.run.iterations import last_iteration
from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.slurm.cluster import HIGH, LOW, missing, private_cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
TWO_TASKS = "--set layout.world_size=2".split()
RECIPE = "kimi_k2_pretrain_cpu"


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    with private_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("site") / "site.yaml"
    path.write_text(
        f"partition: {LOW}\ntime: '00:30:00'\nseconds_to_save: 60\npython: {sys.executable}\n"
        "environment: {OMP_NUM_THREADS: '1'}\n"
    )
    return path


def _launch(profile, save, recipe=RECIPE, *extra):
    argv = ["launch", recipe, "--executor", "slurm", "--profile", str(profile)]
    assert main([*argv, "--save", str(save), *TWO_TASKS, *extra]) == 0


def _state(save, wanted, seconds=900):
    """Wait until the run's last job is in one of the states ``wanted``."""
    deadline = time.monotonic() + seconds
    while True:
        job = jobs_of(str(save))[-1]
        state = states([job]).get(job.number)
        if state is not None and state.name in wanted:
            return state.name
        assert state is None or state.name not in ("FAILED", "CANCELLED"), _log(save)
        assert time.monotonic() < deadline, (state, _log(save))
        time.sleep(0.5)


def _log(save):
    path = Path(save) / "slurm" / f"{jobs_of(str(save))[-1].number}.log"
    return path.read_text()[-3000:] if path.exists() else "no log"


def _reach(save, step, seconds=900):
    deadline = time.monotonic() + seconds
    while last_iteration(Path(save)) < step:
        assert time.monotonic() < deadline, _log(save)
        time.sleep(0.05)


def _losses(save):
    return [(r.iteration, r.loss) for r in read_records(Path(save) / METRICS_FILE)]


@pytest.fixture(scope="module")
def uninterrupted(profile, tmp_path_factory):
    save = tmp_path_factory.mktemp("whole") / "run"
    _launch(profile, save)
    assert _state(save, ("COMPLETED", "FAILED")) == "COMPLETED", _log(save)
    losses = _losses(save)
    assert [iteration for iteration, _ in losses] == list(range(1, 21))
    return losses


def test_a_job_whose_rank_is_killed_fails_and_the_same_command_goes_on(
    uninterrupted, profile, tmp_path
):
    save = tmp_path / "run"
    _launch(profile, save)
    _reach(save, 10)
    pids = subprocess.run(
        ["pgrep", "--full", f"megatron_k2.training.pretrain .*{save}"],
        capture_output=True,
        text=True,
    )
    os.kill(int(pids.stdout.split()[-1]), signal.SIGKILL)
    assert _state(save, ("COMPLETED", "FAILED")) == "FAILED"
    assert len(_losses(save)) < 20
    _launch(profile, save)
    assert _state(save, ("COMPLETED", "FAILED")) == "COMPLETED", _log(save)
    assert _losses(save) == uninterrupted


def _preempt(folder):
    """A job that needs the whole node at once."""
    urgent = ["sbatch", "--parsable", f"--partition={HIGH}", "--ntasks", str(os.cpu_count())]
    urgent += [f"--output={folder}/urgent.log", "--wrap=sleep 1"]
    subprocess.run(urgent, check=True, capture_output=True)


def _words(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_a_job_preempted_during_the_node_check_is_queued_again(profile, tmp_path):
    save = tmp_path / "a run's directory"
    _launch(profile, save)
    _state(save, ("RUNNING",))
    job = jobs_of(str(save))[-1].number
    deadline = time.monotonic() + 300
    while f"{job}.0" not in _words("squeue", "--steps", "--noheader", "--format=%i"):
        assert time.monotonic() < deadline, _log(save)
    _preempt(tmp_path)
    assert _state(save, ("PENDING", "REQUEUED", "PREEMPTED", "COMPLETED")) != "COMPLETED"
    assert "queued again" in _log(save)
    assert "training.pretrain" not in _log(save)
    while "Restarts=1" not in (found := _words("scontrol", "show", "job", job)):
        assert time.monotonic() < deadline, found
    assert not any(word.startswith("PreemptTime=2") for word in found)  # nor is its next start
    assert cancel(str(save)) == [job]


def test_a_preempted_job_saves_is_queued_again_and_resumes(uninterrupted, profile, tmp_path):
    save = tmp_path / "run"
    _launch(profile, save)
    _reach(save, 10)
    _preempt(tmp_path)
    _state(save, ("PENDING", "REQUEUED", "PREEMPTED"))
    assert 10 <= last_iteration(save) < 20
    assert _state(save, ("COMPLETED", "FAILED")) == "COMPLETED", _log(save)
    assert _losses(save) == uninterrupted


def test_a_chain_of_phases_runs_in_order(profile, tmp_path, capsys):
    alone = ["--set", "layout.world_size=1"]  # the last phases' batches are too small for two
    _launch(profile, tmp_path, "kimi_k2_phases_cpu", *alone)
    last = tmp_path / CHAINS["kimi_k2_phases_cpu"][-1]
    assert _state(last, ("COMPLETED", "FAILED", "CANCELLED")) == "COMPLETED", _log(last)
    starts = [
        (tmp_path / name / METRICS_FILE).stat().st_mtime for name in CHAINS["kimi_k2_phases_cpu"]
    ]
    assert starts == sorted(starts)
    capsys.readouterr()
    argv = ["launch", "status", "kimi_k2_phases_cpu", "--save", str(tmp_path)]
    assert main(argv) == 0
    assert capsys.readouterr().out.count("COMPLETED") == 4


def test_fine_tuning_follows_pretraining_and_goes_on_after_it_was_preempted(profile, tmp_path):
    name = "kimi_k2_pretrain_sft_cpu"
    _launch(profile, tmp_path, name)
    pretrained, tuned = (tmp_path / part for part in CHAINS[name])
    _reach(tuned, 10)
    _preempt(tmp_path)
    assert _state(tuned, ("COMPLETED", "FAILED", "CANCELLED")) == "COMPLETED", _log(tuned)
    assert last_iteration(pretrained) == last_iteration(tuned) == 20
    (job,) = jobs_of(str(tuned))
    assert "queued again" in (tuned / "slurm" / f"{job.number}.log").read_text()
    losses = _losses(tuned)
    assert [step for step, _ in losses] == list(range(1, 21))
    alone = tmp_path / "alone"
    _launch(profile, alone, "kimi_k2_sft_cpu", "--start-from", str(pretrained))
    assert _state(alone, ("COMPLETED", "FAILED")) == "COMPLETED", _log(alone)
    assert _losses(alone) == losses


def test_logs_are_followed_to_the_end_and_a_job_is_cancelled(profile, tmp_path):
    save = tmp_path / "run"
    _launch(profile, save)
    _state(save, ("RUNNING",))
    text = follow(str(save), poll_seconds=0.2)
    while not next(text):
        pass
    assert cancel(str(save)) == [jobs_of(str(save))[-1].number]
    assert "slurmstepd" in "".join(text)  # Slurm's words at the end
    assert _state(save, ("CANCELLED",))
    assert cancel(str(save)) == []
