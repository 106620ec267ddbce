"""Recipes through NeMo-Run: what its partials hold, its script, a local run, jobs on a real Slurm.

Needs NeMo-Run (``make launch-venv``); the jobs need a Slurm as well (``make test-slurm``).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("nemo_run", reason="NeMo-Run is not in this environment: make test-slurm")

import nemo_run as run

from megatron_k2.errors import UserError
from megatron_k2.launch.cluster import Cluster
from megatron_k2.nemo.factories import finetune_recipe, pretrain_recipe
from megatron_k2.nemo.tasks import slurm_executor, task, train_recipe
from megatron_k2.recipes import RECIPES, get_recipe
from megatron_k2.run.iterations import last_iteration
from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.slurm.cluster import LOW, missing, private_cluster

pytestmark = pytest.mark.slurm
RECIPE = "kimi_k2_pretrain_cpu"


def test_a_task_names_its_recipe_and_nothing_else():
    one = task("kimi_k2_anneal_4k_cpu", "runs/b", "runs/a", ["phase.lr=1e-3"])
    assert one.__fn_or_cls__ is train_recipe
    assert one.recipe == "kimi_k2_anneal_4k_cpu"
    assert (one.save, one.start_from) == tuple(str(Path(f"runs/{x}").absolute()) for x in "ba")


def test_the_executor_has_the_recipes_size_and_the_sites_names(tmp_path):
    site = Cluster(account="k2", partition="big", container="i.sqsh", mounts=("/a:/a",))
    recipe = get_recipe("kimi_k2_pretrain_256gpu_h800")
    executor = slurm_executor(recipe, site, tmp_path)
    assert (executor.nodes, executor.ntasks_per_node, executor.gpus_per_node) == (32, 8, 8)
    assert (executor.account, executor.partition, executor.container_image) == (
        "k2",
        "big",
        "i.sqsh",
    )
    assert executor.env_vars["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert executor.signal == "TERM@600"
    assert executor.tunnel.job_dir == str(tmp_path / "experiments")
    with pytest.raises(UserError, match="--account and --partition"):
        slurm_executor(recipe, Cluster(), tmp_path)


def test_every_recipe_is_a_factory_of_the_entry_point():
    factories = run.cli.list_factories("k2")
    found = {factory.__name__ for factory in factories}
    assert found >= set(RECIPES)


def test_the_older_style_finds_the_recipe_of_its_size(tmp_path):
    partial = pretrain_recipe(dir=str(tmp_path), name="x", num_nodes=64, hardware="h100")
    assert partial.recipe == "kimi_k2_pretrain_512gpu_h100"
    assert partial.save == str(tmp_path / "x")
    with pytest.raises(UserError, match="did you mean"):
        pretrain_recipe(num_nodes=65)


def test_fine_tuning_is_called_as_nemos_recipes_are(tmp_path):
    partial = finetune_recipe(dir=str(tmp_path), resume_path="/imported", name="x", num_nodes=64)
    assert partial.recipe == "kimi_k2_sft_512gpu_h800"
    assert (partial.save, partial.start_from) == (f"{tmp_path}/x", "/imported")
    found = finetune_recipe(hardware="h100").start_from
    assert found.endswith("runs/kimi_k2_yarn_128k_256gpu_h100")


def _start(save, *more):
    """As from a shell: NeMo-Run reads standard input."""
    argv = ["launch", RECIPE, "--nemo-run", "--save", str(save), *more]
    with _printed(save).open("w") as terminal:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_k2", *argv, "--set", "layout.world_size=2"],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=subprocess.STDOUT,
        )


def _printed(save):
    return save.with_suffix(".txt")


def _losses(save):
    return [r.loss for r in read_records(Path(save) / METRICS_FILE)]


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """As in an activated environment: NeMo-Run calls python and torchrun by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    save = tmp_path_factory.mktemp("local") / "run"
    assert _start(save, "--executor", "local").wait() == 0, _printed(save).read_text()
    return save


def test_a_local_experiment_checks_its_ranks_and_trains(local):
    assert last_iteration(local) == 20
    assert len(_losses(local)) == 20
    assert "2 ranks agree" in _printed(local).read_text()


def _jobs():
    """Numbers of the jobs that run."""
    asked = ["squeue", "--noheader", "--format=%i", "--states=RUNNING"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_two_tasks_on_slurm_are_checked_interrupted_and_train_the_same_numbers(local, tmp_path):
    """The signal is what Slurm sends before the time limit."""
    site = tmp_path / "site.yaml"
    site.write_text(f"account: root\npartition: {LOW}\ntime: '00:30:00'\n")
    save = tmp_path / "run"
    with private_cluster(tmp_path / "slurm"):
        launched = _start(save, "--executor", "slurm", "--profile", str(site))
        while last_iteration(save) < 10:
            assert launched.poll() is None, _printed(save).read_text()
            time.sleep(0.05)
        (job,) = _jobs()
        subprocess.run(["scancel", "--signal=TERM", job], check=True)
        assert launched.wait() == 0, _printed(save).read_text()
        shown = subprocess.run(
            ["scontrol", "show", "job", job], check=True, capture_output=True, text=True
        )
    logs = [path.read_text() for path in (tmp_path / "nemo").rglob(f"log*_{job}_*.out")]
    assert "Restarts=1" in shown.stdout
    assert sum("2 ranks agree" in log for log in logs) == 2, logs
    assert "ended at step" in (save / "logs" / "rank0.log").read_text()
    assert _losses(save) == _losses(local)
