"""The sbatch script: as rendered once and kept, as bash reads it, and as it behaves.

Slurm's commands are stubs here: what srun, scancel and scontrol do on a cluster is not exercised.
"""

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_k2.errors import UserError
from megatron_k2.flags import megatron as flags
from megatron_k2.launch.cluster import Cluster, read_profile
from megatron_k2.launch.command import render_command
from megatron_k2.launch.overrides import apply
from megatron_k2.launch.slurm import job_name, num_nodes, render, submit
from megatron_k2.recipes import get_recipe
from tests.support.paths import REPOSITORY

GOLDEN = Path(__file__).parent / "golden" / "kimi_k2_long_32k_512gpu_h100.sbatch"
SITE = Cluster(
    account="k2",
    partition="big one",
    container="/images/k2.sqsh",
    mounts=("/lustre:/lustre",),
    environment=(("NCCL_IB_HCA", "mlx5"), ("NCCL_IB_TIMEOUT", "23")),
)


def _long():
    recipe = get_recipe("kimi_k2_long_32k_512gpu_h100")
    return render(recipe, "/lustre/runs of us/b", "/lustre/runs of us/a", SITE)


def test_the_script_is_the_one_that_was_reviewed():
    assert _long() == GOLDEN.read_text()


@pytest.mark.parametrize(
    "script", [_long, lambda: render_command(get_recipe("kimi_k2_pretrain_cpu"), "r")]
)
def test_bash_reads_it(script):
    done = subprocess.run(["bash", "-n"], input=script(), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        ("pretrain", "256gpu_h800"),
        ("sft", "256gpu_h800"),
        ("lora", "32gpu_h200"),
        ("rl", "256gpu_h800"),
    ],
)
def test_the_example_is_the_recipes_own_flags(stage, where, monkeypatch):
    monkeypatch.setattr(flags, "APEX_WEIGHT_GRADIENTS", "not_installed")  # it was written without
    recipe = get_recipe(f"kimi_k2_{stage}_{where}")
    save = f"runs/{recipe.name}"
    start_from = f"runs/{recipe.previous}" if recipe.previous else None
    text = (REPOSITORY / "examples" / f"{stage}_k2.sh").read_text()
    assert text == render_command(recipe, save, start_from)
    array = text[text.index("flags=(") : text.index("exec ")]
    done = subprocess.run(
        ["bash", "-c", array + 'printf "%s\\n" "${flags[@]}"'], text=True, capture_output=True
    )
    assert done.stdout.splitlines() == recipe.to_megatron_args(save, start_from)


STUBS = {
    "srun": 'echo $$ > "$SAVE/pid"\n'
    'if [[ "$*" == *launch.node_check* ]]; then\n'
    '[ "$CHECK" != waits ] || exec sleep 10\n'
    "exit $CHECK\n"
    "fi\n"
    'touch "$SAVE/started"\n'
    'trap "echo $AFTER > $SAVE/latest_checkpointed_iteration.txt; exit $CODE" TERM\n'
    'if [ "$WAITS" = 1 ]; then for i in $(seq 200); do sleep 0.05; done; fi\n'
    'echo $AFTER > "$SAVE/latest_checkpointed_iteration.txt"; exit $CODE',
    "scancel": 'kill -TERM "$(cat "$SAVE/pid")"',
    "scontrol": 'case "$1 $2" in "show job") echo "PreemptTime=$PREEMPTED";;\n'
    '*) echo "$@" >> "$SAVE/scontrol";; esac',
}


def _job(tmp_path, *, before=0, after=100, code=0, check="0", signals=None, preempted="None"):
    """The script run with stubs; (exit code, what scontrol was asked last).

    ``signals``: the step that is running when Slurm says that the time limit is near.
    """
    save = tmp_path / "run"
    save.mkdir()
    for name, body in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    (save / "latest_checkpointed_iteration.txt").write_text(f"{before}\n")
    script, recipe = tmp_path / "job.sh", get_recipe("kimi_k2_yarn_128k_512gpu_h200")
    script.write_text(render(recipe, str(save), None, Cluster()))
    own = {"SAVE": save, "AFTER": after, "CODE": code, "WAITS": int(signals == "started")}
    own |= {"CHECK": check, "PREEMPTED": preempted}
    slurm_own = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    environment = os.environ | slurm_own | {name: str(v) for name, v in own.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.DEVNULL)
    if signals:
        deadline = time.monotonic() + 20
        while not (save / signals).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)  # the stub's trap is set after its sign of life
        job.send_signal(signal.SIGUSR1)
    return job.wait(timeout=30), (save / "scontrol").read_text().splitlines()[-1]


NOT_QUEUED = "show hostnames n1"


def test_a_signal_before_the_limit_saves_and_queues_again(tmp_path):
    assert _job(tmp_path, signals="started") == (0, "requeue 7")


def test_a_finished_run_is_not_queued_again(tmp_path):
    assert _job(tmp_path, before=200, after=300, preempted="2026-11-22T12:00:00") == (0, NOT_QUEUED)


def test_a_failed_run_is_not_queued_again(tmp_path):
    assert _job(tmp_path, code=9) == (9, NOT_QUEUED)


def test_a_node_that_is_not_as_it_should_be_ends_the_job_before_the_first_step(tmp_path):
    assert _job(tmp_path, check="1") == (1, NOT_QUEUED)
    assert not (tmp_path / "run" / "started").exists()


@pytest.mark.parametrize("step", [{"check": "143"}, {"code": 143, "after": 0}])
def test_preemption_before_the_first_step_queues_again(step, tmp_path):
    """SIGTERM finds the node check, or ranks that have not come to Megatron's handler yet."""
    assert _job(tmp_path, preempted="2026-11-22T12:00:00", **step) == (0, "requeue 7")


def test_a_signal_during_the_check_starts_no_training_and_is_not_repeated_for_ever(tmp_path):
    """The time limit is too short for a first step: queued again, it would be again."""
    assert _job(tmp_path, check="waits", signals="pid") == (1, NOT_QUEUED)
    assert not (tmp_path / "run" / "started").exists()


def test_a_run_that_makes_no_progress_is_not_queued_for_ever(tmp_path):
    assert _job(tmp_path, before=100) == (1, NOT_QUEUED)


def test_context_parallel_ranks_without_overlap_get_one_queue():
    overlapped = get_recipe("kimi_k2_yarn_128k_512gpu_h200")
    assert overlapped.layout.vpp == 2
    alone = apply(overlapped, ["layout.has_overlap=false"])
    scripts = [render(recipe, "r", None, Cluster()) for recipe in (overlapped, alone)]
    assert "CUDA_DEVICE_MAX_CONNECTIONS=32\n" in scripts[0]
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1\n" in scripts[1]


def test_a_profile_is_read(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(
        "account: 007\ncontainer: i.sqsh\npartition:\nmounts: ['/a:/b']\nenvironment: {A: 1}\n"
    )
    assert read_profile(path) == Cluster(
        account="7", container="i.sqsh", mounts=("/a:/b",), environment=(("A", "1"),)
    )
    path.write_text("# nothing decided yet\n")
    assert read_profile(path) == Cluster()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acount: k2", "no key is called acount; did you mean 'account'"),
        ("zzz: k2", "no key is called zzz; one of: account, "),
        ("- a", "expected lines of 'key: value'"),
        ("a: [", "not YAML"),
        ("account: [a, b]", r"account: \['a', 'b'\]: expected one word"),
        ("account: on", "account: True: expected one word"),
        ("seconds_to_save: 10m", "seconds_to_save: '10m': expected a whole number of seconds"),
        ("seconds_to_save: -5", "seconds_to_save -5: expected the seconds"),
        ("time: 24:00:00", "time 86400: expected .*in quotes"),
        ("mounts: /a:/b", "mounts: '/a:/b': expected a list"),
        ("{container: i, mounts: [/a]}", "mounts: /a: expected FROM:TO"),
        ("mounts: ['/a:/a']", "mounts /a:/a without a container"),
        ("environment: [A=1]", "environment: .*expected NAME: value pairs"),
        ("environment: {BAD NAME: 1}", "expected variables' names, which 'BAD NAME' is not"),
        ("environment: {A: yes}", "A: 'text' or a number; true, false and nothing in quotes"),
    ],
)
def test_a_profiles_mistake_is_named_with_what_was_expected(text, words, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as refused:
        read_profile(path)
    assert str(path) in str(refused.value)


def test_a_profile_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such file; examples/cluster/site\.yaml"):
        read_profile(tmp_path / "none.yaml")


def test_jobs_of_one_run_share_a_name_and_of_another_do_not(tmp_path, monkeypatch):
    recipe = get_recipe("kimi_k2_pretrain_cpu")
    monkeypatch.chdir(tmp_path)
    name = job_name(recipe, "runs/a")
    assert name.startswith(recipe.name)
    assert job_name(recipe, str(tmp_path / "runs" / "a")) == name
    assert job_name(recipe, "runs/b") != name


def test_the_example_profile_has_every_key():
    read = read_profile(REPOSITORY / "examples" / "cluster" / "site.yaml")
    assert (read.account, read.seconds_to_save) == ("k2", 600)
    text = (REPOSITORY / "examples" / "cluster" / "site.yaml").read_text()
    assert all(f"\n{field.name}:" in text for field in dataclasses.fields(Cluster))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Cluster(time="2 days"), "expected .*hours:minutes:seconds"),
        (lambda: num_nodes(get_recipe("kimi_k2_pretrain_256gpu_h800"), 16), "32 nodes"),
        (lambda: num_nodes(get_recipe("kimi_k2_pretrain_cpu"), 2), "a twin for the CPU, on one"),
    ],
)
def test_a_wrong_input_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_without_sbatch_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("megatron_k2.launch.jobs.shutil.which", lambda name: None)
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        submit("", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
