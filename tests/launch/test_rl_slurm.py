"""The sbatch script of RL with engines: as kept, as bash reads it, and as it behaves.

Slurm's commands and python are stand-ins here; ``tests/slurm`` has the real ones. What a step's own
bash does is run as it is.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_k2.errors import UserError
from megatron_k2.launch.cluster import Cluster
from megatron_k2.launch.overrides import apply
from megatron_k2.launch.rl_engines import engines_file, rl_nodes
from megatron_k2.launch.rl_slurm import render_rl
from megatron_k2.launch.script import render_script
from megatron_k2.nemo.tasks import local_executor, slurm_executor, train_recipe
from megatron_k2.recipes import get_recipe
from megatron_k2.rl.cluster.commands import Place, command_of
from megatron_k2.rl.cluster.engines import members_of, read_engines
from tests.launch.test_slurm import SITE

GOLDEN = Path(__file__).parent / "golden"
K2 = ("kimi_k2_rl_256gpu_h800", "kimi_k2_rl_256gpu_h200")
APART = ["stage.engines.is_colocated=false"]


def _script(name, site=SITE, *assignments):
    recipe = apply(get_recipe(name), list(assignments))
    return render_script(recipe, "/lustre/runs of us/b", "/lustre/runs of us/a", site)


@pytest.mark.parametrize("name", K2)
def test_the_scripts_are_those_that_were_reviewed(name):
    assert _script(name) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize(
    "script",
    [
        lambda: _script(K2[0]),
        lambda: _script(K2[0], replace(SITE, gym_nodes=4, gym_partition="c p u")),
        lambda: _script(K2[0], SITE, *APART),
        lambda: _script("moonlight_16b_a3b_rl_16gpu_h100"),
        lambda: _script("kimi_k2_rl_cluster_cpu", Cluster()),
    ],
)
def test_bash_reads_it(script):
    done = subprocess.run(["bash", "-n"], input=script(), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_engines_on_nodes_of_their_own_lie_behind_the_trainers():
    recipe = apply(get_recipe(K2[0]), APART)
    assert rl_nodes(recipe) == (32, 32)
    script = _script(K2[0], SITE, *APART)
    assert "#SBATCH --nodes=64\n" in script
    assert "step supervisor --relative=32 --nodes=32 --ntasks=32 " in script
    assert 'step "$name" --nodes=32 --ntasks=256 ' in script
    assert json.loads(_heredoc(script))["after"] == "", "nothing of a GPU is waited for"
    with pytest.raises(UserError, match="32 nodes of the trainer and 32 of engines, 64 in all"):
        rl_nodes(recipe, 32)


def test_environments_may_have_nodes_of_their_own():
    script = _script(K2[0], replace(SITE, gym_nodes=4, gym_partition="cpu"))
    own = script[script.index("#SBATCH hetjob") : script.index("set -uo pipefail")]
    assert "#SBATCH --partition=cpu\n#SBATCH --nodes=4\n" in own
    assert "gpus" not in own
    assert "step gym --het-group=1 --ntasks=4 " in script
    assert "--gym 4)" in script


def _heredoc(script):
    return script[script.index("<<'ENGINES'\n") + 11 : script.index("\nENGINES\n")]


def test_the_engines_file_says_what_was_planned():
    said = json.loads(_heredoc(_script(K2[0])))
    assert (said["replicas"], said["nodes_per_replica"], said["gpus_per_node"]) == (8, 4, 8)
    assert said["options"]["max_num_seqs"] == 8, "256 answers over 32 groups of one GPU"
    assert said["options"]["gpu_memory_utilization"] == 0.89, "what the sleeping trainer leaves"
    assert said["model"]["directory"] == "data/Kimi-K2-Instruct"
    backends = {"sglang": "max_running_requests", "local": "num_slots"}
    for backend, key in backends.items():
        changed = apply(get_recipe(K2[0]), [f"stage.engines.backend={backend}"])
        assert engines_file(changed, "r")["options"][key] == 256
    twin = engines_file(get_recipe("kimi_k2_rl_cluster_cpu"), "r")
    assert twin["model"] == {
        "preset": "k2-tiny",
        "max_position_embeddings": 128,
        "yarn": None,
        "tokenizer": "runs/synthetic/letters_tokenizer",
    }
    assert twin["weights_directory"] == "/dev/shm", "all of it is on one node"
    assert said["weights_directory"] == "/lustre/runs of us/b/rl/weights"
    assert twin["options"] == {
        "num_slots": 16,
        "max_length": 128,
        "dtype": "float32",
        "batch_invariant": True,
    }


@pytest.mark.parametrize("backend", ["vllm", "sglang", "local"])
@pytest.mark.parametrize("name", [*K2, "moonlight_16b_a3b_rl_16gpu_h100"])
def test_supervisors_read_the_file_and_make_commands_of_it(name, backend, tmp_path):
    assignments = [f"stage.engines.backend={backend}"]
    recipe = apply(get_recipe(name), assignments)
    said = engines_file(recipe, str(tmp_path)) | (
        {"nodes_per_replica": 1} if backend == "local" else {}
    )
    (tmp_path / "rl" / "weights").mkdir(parents=True)  # as the script does
    path = tmp_path / "engines.json"
    path.write_text(json.dumps(said))
    engines = read_engines(path)
    nodes = engines.replicas * engines.nodes_per_replica
    (member,) = members_of(engines, nodes - 1, nodes)
    assert member.replica == engines.replicas - 1
    place = Place("h", 1, "l", 2, tmp_path, tmp_path, tmp_path)
    words = command_of(engines, member, place, "token").words
    if backend == "vllm" and engines.nodes_per_replica > 1:
        assert "--headless" in words
        gpus = recipe.stage.engines.gpus
        assert words[words.index("--data-parallel-size") + 1] == str(gpus)


def test_a_recipe_without_engines_has_no_such_script():
    with pytest.raises(UserError, match="no engines beside the trainer"):
        render_rl(get_recipe("kimi_k2_rl_cpu"), "r", None, Cluster())
    assert "rendezvous" not in render_script(get_recipe("kimi_k2_rl_cpu"), "r", None, Cluster())


@pytest.mark.parametrize("name", [K2[0], "kimi_k2_rl_cluster_cpu"])
def test_nemo_run_is_told_that_this_is_more_than_a_task(name, tmp_path):
    site = Cluster(account="k2", partition="big")
    for call in (
        lambda: slurm_executor(get_recipe(name), site, tmp_path),
        lambda: local_executor(get_recipe(name)),
        lambda: train_recipe(name, str(tmp_path / "run")),
    ):
        with pytest.raises(UserError, match="without --nemo-run"):
            call()


STUBS = {
    # A step is a process group of its own, which scancel signals as a whole.
    "srun": 'while [ "$1" != bash ]; do shift; done\n'
    "export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4 SLURM_STEP_ID=$$\n"
    'case "$*" in *rl.train*) [ "$MASKED" = 0 ] || { "$@"; exit 143; } ;; esac\n'
    'exec setsid "$@"',
    "scancel": 'echo "$@" >> "$SAVE/scancel"; kill -TERM -- "-${2#7.}"',
    "scontrol": 'case "$1 $2" in "show job") echo "PreemptTime=$PREEMPTED";;\n'
    '*) echo "$@" >> "$SAVE/scontrol";; esac',
    "python": 'module=${2##*.}; shift 2; echo "$module ${RANK-no} $*" >> "$SAVE/calls"\n'
    'tried=$(grep -c "^$module " "$SAVE/calls")\n'
    "case $module in\n"
    "node_check) exit 0 ;;\n"
    "train)\n"
    '  trap "echo $AFTER > $SAVE/latest_checkpointed_iteration.txt; exit 0" TERM\n'
    "  for i in $(seq $WAITS); do sleep 0.05; done; sleep 0.2\n"
    '  echo $AFTER > "$SAVE/latest_checkpointed_iteration.txt"; exit $CODE ;;\n'
    "supervisor)\n"
    '  [ "$tried" -gt 1 ] || [ "$FIRST" -eq 0 ] || exit "$FIRST" ;;\n'
    "esac\n"
    # A step asks twice: the group as a whole, and its bash the child.
    "trap over=1 TERM\n"
    'for i in $(seq 400); do [ -z "$over" ] || break; sleep 0.05; done\n'
    'echo "$module" >> "$SAVE/ended"',
    "sleep": 'exec /bin/sleep "$(case $1 in 2) echo 0.1;; *) echo $1;; esac)"',
}
NOT_QUEUED = "show hostnames n1"


class Job:
    """The script run with stand-ins."""

    def __init__(
        self, tmp_path, *, before=0, after=100, code=0, first=0, waits=0, preempted="no", masked=0
    ):
        self.save = tmp_path / "run"
        self.save.mkdir(exist_ok=True)
        for name, body in STUBS.items():
            stub = tmp_path / name
            stub.write_text(f"#!/bin/bash\n{body}\n")
            stub.chmod(0o755)
        (self.save / "latest_checkpointed_iteration.txt").write_text(f"{before}\n")
        script = tmp_path / "job.sh"
        site = Cluster(python=str(tmp_path / "python"))
        script.write_text(render_rl(get_recipe(K2[0]), str(self.save), None, site))
        own = {"SAVE": self.save, "AFTER": after, "CODE": code, "FIRST": first, "WAITS": waits}
        own["MASKED"] = masked
        own |= {"PREEMPTED": preempted, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n1"}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        with (tmp_path / "out").open("w") as out:
            self.process = subprocess.Popen(
                ["bash", str(script)], env=environment, stdout=out, stderr=out
            )
        self.out = tmp_path / "out"

    def end(self):
        """(exit code, what scontrol was asked last)."""
        code = self.process.wait(timeout=30)
        return code, self.lines("scontrol")[-1]

    def lines(self, name):
        path = self.save / name
        return path.read_text().splitlines() if path.exists() else []

    def until(self, name, number=1):
        deadline = time.monotonic() + 20
        while len(self.lines(name)) < number:
            assert time.monotonic() < deadline, (self.out.read_text(), self.lines("calls"))
            time.sleep(0.02)


def test_every_process_is_started_once_and_ended_with_the_trainer(tmp_path):
    job = Job(tmp_path, after=400)
    assert job.end() == (0, NOT_QUEUED)
    calls = job.lines("calls")
    assert calls[0].startswith("node_check 0 "), "nothing else runs while GPUs are looked at"
    assert sorted(line.split()[0] for line in calls[1:]) == sorted(
        ["supervisor", "gym_service", "controller", "train"]
    )
    said = {line.split()[0]: line for line in calls}
    meet = f"{job.save}/rl/rendezvous/7.0"
    assert said["supervisor"].endswith(f"--engines {meet}/engines.json")
    assert said["gym_service"].endswith("--tasks data/task_sets.json")
    for name in ("controller", "train"):
        assert (
            f" --meet {meet} --engines {meet}/engines.json --gym 32 --preset kimi-k2" in said[name]
        )
    assert said["train"].startswith("train 0 ")
    assert said["controller"].startswith("controller no "), "it is no rank"
    assert sorted(job.lines("ended")) == ["controller", "gym_service", "supervisor"]
    assert json.loads(Path(meet, "engines.json").read_text()) == engines_file(
        get_recipe(K2[0]), str(job.save)
    )
    assert Path(meet).stat().st_mode & 0o777 == 0o700


def test_a_supervisor_that_dies_is_started_again_beside_the_trainer(tmp_path):
    job = Job(tmp_path, after=400, first=137, waits=40)
    assert job.end() == (0, NOT_QUEUED)
    names = [line.split()[0] for line in job.lines("calls")]
    assert names.count("supervisor") == 2
    assert names.count("train") == names.count("controller") == 1
    assert "supervisor 0 ended with 137: started again" in job.out.read_text()


def test_a_supervisor_that_refuses_is_left_alone(tmp_path):
    job = Job(tmp_path, after=400, first=2, waits=20)
    assert job.end() == (0, NOT_QUEUED)
    assert [line.split()[0] for line in job.lines("calls")].count("supervisor") == 1


def test_before_the_limit_the_trainer_alone_is_asked_and_the_others_go_on_until_it_has_saved(
    tmp_path,
):
    job = Job(tmp_path, waits=400)
    job.until("calls", 5)
    time.sleep(0.2)  # the stand-in's trap is set after its sign of life
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == (0, "requeue 7")
    first, *rest = job.lines("scancel")
    trainer = (job.save / "rl" / "rendezvous" / "7.0" / "trainer.step").read_text().strip()
    asked = [first, *rest]
    assert asked.index(f"--signal=TERM {trainer}") <= 1, "the check's step has ended, if asked"
    assert len(asked) >= 4, "then the three others"


@pytest.mark.parametrize("code", [137, 1, 0])
def test_a_rank_that_dies_behind_a_checkpoint_queues_the_job_again(code, tmp_path):
    assert Job(tmp_path, before=100, after=104, code=code).end() == (0, "requeue 7")


def test_a_start_without_a_checkpoint_is_queued_again_once(tmp_path):
    assert Job(tmp_path, before=100, code=137).end() == (0, "requeue 7")
    assert Job(tmp_path, before=100, code=137).end() == (137, NOT_QUEUED)
    assert Job(tmp_path, before=100, after=104, code=137).end() == (0, "requeue 7")
    assert Job(tmp_path, before=104, after=104, code=137).end() == (0, "requeue 7")


@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("code", [2, 3])
def test_what_is_refused_and_what_set_off_an_alarm_is_not_queued_again(code, masked, tmp_path):
    """Also where srun tells of the ranks that it ended after the first that refused."""
    assert Job(tmp_path, code=code, masked=masked).end() == (code, NOT_QUEUED)


def test_a_preempted_job_is_queued_again(tmp_path):
    job = Job(tmp_path, after=0, code=143, preempted="2026-11-27T12:00:00")
    assert job.end() == (0, "requeue 7")
