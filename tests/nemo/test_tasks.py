"""What a task of NeMo-Run does around the training; NeMo-Run itself is not needed for it.

Its partials, executors and jobs: ``tests/slurm/test_nemo_run.py``.
"""

import os
import subprocess

import pytest

from megatron_k2.errors import UserError
from megatron_k2.launch.cluster import Cluster
from megatron_k2.launch.slurm import check_arguments, render
from megatron_k2.nemo import tasks
from megatron_k2.nemo.tasks import local_executor, run_experiment, train_recipe
from megatron_k2.recipes import get_recipe
from megatron_k2.training import pretrain

TWIN = get_recipe("kimi_k2_pretrain_cpu")
SRUNS = {
    "SLURM_JOB_ID": "12345",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


@pytest.fixture
def started(monkeypatch):
    """What the task starts, in order: the node check (its command, its port), the training."""
    seen = []

    def check(command, *, env, check):
        seen.append((command[2:], env["MASTER_PORT"]))
        return subprocess.CompletedProcess(command, code.get("check", 0))

    code: dict[str, int] = {}
    monkeypatch.setattr(tasks.subprocess, "run", check)
    monkeypatch.setattr(os, "environ", dict(os.environ) | SRUNS)
    monkeypatch.setattr(pretrain, "run", lambda flags, program: seen.append((flags, program)))
    return seen, code


def _saved(save, step):
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")


def test_every_start_checks_the_nodes_as_the_plain_script_does(started, tmp_path):
    seen, _ = started
    _saved(tmp_path / "run", TWIN.steps)
    train_recipe(TWIN.name, str(tmp_path / "run"))
    (check, port), (flags, program) = seen
    assert program is pretrain.PRETRAIN
    assert flags == TWIN.program_flags(str(tmp_path / "run"))
    assert check == ["megatron_k2.launch.node_check", *check_arguments(TWIN), *flags]
    script = render(TWIN, "runs/x", None, Cluster())
    assert f"megatron_k2.launch.node_check {' '.join(check_arguments(TWIN))} " in script
    assert os.environ["MASTER_PORT"] == str(20000 + 2 * 2345)
    assert port == str(20000 + 2 * 2345 + 1)


def test_under_torchrun_the_check_meets_at_its_store(started, tmp_path, monkeypatch):
    seen, _ = started
    _saved(tmp_path / "run", TWIN.steps)
    torchruns = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    os.environ.update(torchruns, TORCHELASTIC_USE_AGENT_STORE="True")
    train_recipe(TWIN.name, str(tmp_path / "run"))
    assert seen[0][1] == "29500"


def test_a_bad_node_ends_the_task_before_the_training(started, tmp_path):
    seen, code = started
    code["check"] = 1
    with pytest.raises(SystemExit, match="1"):
        train_recipe(TWIN.name, str(tmp_path / "run"))
    assert len(seen) == 1


def test_a_task_that_was_interrupted_ends_with_an_error_so_that_it_is_started_again(
    started, tmp_path, monkeypatch
):
    def interrupted(flags, program):
        raise SystemExit(0)  # as Megatron ends after a signal and a save

    monkeypatch.setattr(pretrain, "run", interrupted)
    _saved(tmp_path / "run", 10)
    with pytest.raises(SystemExit, match="ended at step 10 of 20"):
        train_recipe(TWIN.name, str(tmp_path / "run"))


@pytest.mark.usefixtures("started")
def test_a_layout_that_does_not_fit_is_refused_on_the_ranks_too_unless_forced(tmp_path):
    too_large = ["kimi_k2_yarn_128k_512gpu_h100", str(tmp_path / "run"), None]
    change = ["layout.recompute=", "layout.optimizer_offload=0", "layout.activation_offload=0"]
    with pytest.raises(UserError):
        train_recipe(*too_large, change)
    _saved(tmp_path / "run", 10**9)
    train_recipe(*too_large, change, force=True)


def test_what_cannot_start_is_refused_before_nemo_run_is_asked(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="needs 256 GPUs"):
        local_executor(get_recipe("kimi_k2_pretrain_256gpu_h800"))
    monkeypatch.setattr(tasks, "nemo_run", lambda: None)
    second = get_recipe("kimi_k2_anneal_4k_cpu")
    with pytest.raises(UserError, match="run kimi_k2_pretrain_cpu first"):
        run_experiment([(second, str(tmp_path / "b"), str(tmp_path / "a"))], [], None, waits=True)
