"""A recipe as one plain sbatch script, and its submission.

One task a GPU, started by srun, so that a signal reaches every rank. Nodes are checked first
(``launch/node_check.py``). The script ends in one of four ways: the run is done; it was preempted,
before its first step or after, and the job queues itself again; it ended early and well, which is a
signal before the time limit, and has saved: likewise; or a rank failed, and the job fails with it.
Lost nodes are Slurm's to requeue. The same ``--save`` makes every start a resume.
"""

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence

from megatron_k2.errors import UserError
from megatron_k2.launch.cluster import Cluster
from megatron_k2.launch.environment import cluster_environment
from megatron_k2.launch.jobs import give_to_sbatch
from megatron_k2.launch.recipe import Recipe
from megatron_k2.planning.cost.adapters import total_elements
from megatron_k2.planning.cost.memory import MUON_STATE_BYTES, WEIGHT_BYTES
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.planning.gpus import GPUS_PER_NODE
from megatron_k2.run.iterations import TRACKER


def num_nodes(recipe: Recipe, asked: int | None = None) -> int:
    """Nodes of eight GPUs, or one of a twin for the CPU; ``asked`` must agree.

    Raises:
        UserError: where it does not.
    """
    nodes = 1 if recipe.is_cpu else -(-recipe.layout.world_size // GPUS_PER_NODE)
    if asked is None or asked == nodes:
        return nodes
    if recipe.is_cpu:
        raise UserError(f"--nodes {asked}: {recipe.name} is a twin for the CPU, on one node")
    raise UserError(
        f"--nodes {asked}: {recipe.name} is {recipe.layout.world_size} GPUs on {nodes} nodes; "
        f"change it by --set layout.world_size={asked * GPUS_PER_NODE}"
    )


def job_name(recipe: Recipe, save: str) -> str:
    """The name of every job of one run, and of no other's: jobs of a name run in turn."""
    digest = hashlib.sha256(os.path.abspath(save).encode()).hexdigest()[:8]
    return f"{recipe.name}-{digest}"


def header(recipe: Recipe, cluster: Cluster, save: str, nodes: int) -> list[str]:
    """What sbatch is asked for, a line each.

    Args:
        recipe: a run.
        cluster: the site.
        save: the run's directory.
        nodes: of the allocation.
    """
    tasks = recipe.layout.world_size if nodes == 1 else GPUS_PER_NODE
    on_gpus = {} if recipe.is_cpu else {"gpus-per-node": tasks, "exclusive": ""}
    options = {
        "job-name": job_name(recipe, save),
        "account": cluster.account,
        "partition": cluster.partition,
        "nodes": nodes,
        "ntasks-per-node": tasks,
        **on_gpus,
        "time": cluster.time,
        "output": f"{save}/slurm/%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": f"B:USR1@{cluster.seconds_to_save}",
        "dependency": "singleton",
    }
    return asked(options)


def asked(options: Mapping[str, object]) -> list[str]:
    """Options of sbatch as lines of a script; one without a value is "", one left out ``None``."""
    return [
        f"#SBATCH --{name}" + (f"={shlex.quote(str(value))}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    ]


def exports(recipe: Recipe, cluster: Cluster) -> list[str]:
    """The environment of every rank, a line each."""
    environment = cluster_environment(recipe.layout) | dict(cluster.environment)
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def wrapped(flags: list[str], indent: str = "  ") -> str:
    """Flags quoted for a shell, one option a line."""
    lines: list[str] = []
    for flag in flags:
        quoted = shlex.quote(flag)
        if flag.startswith("--") or not lines:
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return f"\n{indent}".join(lines)


def render(
    recipe: Recipe,
    save: str,
    start_from: str | None,
    cluster: Cluster,
    nodes: int | None = None,
) -> str:
    """The sbatch script.

    Raises:
        UserError: see ``num_nodes``.
    """
    lines = header(recipe, cluster, save, num_nodes(recipe, nodes))
    return TEMPLATE.format(
        head=head(recipe, save, start_from, cluster, lines),
        program=recipe.stage.module,
        srun=shlex.join(["srun", "--kill-on-bad-exit=1", *container_words(cluster)]),
        python=shlex.quote(cluster.python),
        check=shlex.join(check_arguments(recipe)),
    )


def head(
    recipe: Recipe, save: str, start_from: str | None, cluster: Cluster, lines: Sequence[str]
) -> str:
    """A script's beginning: what is asked for, the environment, the flags, what was saved before.

    Args:
        recipe: a run.
        save: its directory.
        start_from: the weights it starts from.
        cluster: the site.
        lines: of ``header``.
    """
    return HEAD.format(
        header="\n".join(lines),
        exports="\n".join(exports(recipe, cluster)),
        save=shlex.quote(save),
        steps=recipe.steps,
        tracker=TRACKER,
        flags=wrapped(recipe.program_flags(save, start_from)),
    ).rstrip("\n")


def container_words(cluster: Cluster) -> list[str]:
    """Of srun, for pyxis."""
    words = [f"--container-image={cluster.container}"] if cluster.container else []
    return [*words, *([f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else [])]


def check_arguments(recipe: Recipe) -> list[str]:
    """What ``launch/node_check.py`` is to expect; the training's flags follow."""
    ranks = recipe.layout.world_size
    gpus = 0 if recipe.is_cpu else ranks // num_nodes(recipe)
    lora_rank = recipe.layout.lora_rank
    whole = count_parameters(recipe.preset).total
    parameters = total_elements(recipe.preset, lora_rank) if lora_rank else whole
    gigabytes = parameters * (WEIGHT_BYTES + MUON_STATE_BYTES) / 1e9
    wanted = {"ranks": ranks, "gpus": gpus, "checkpoint-gb": f"{gigabytes:.0f}"}
    return [word for name, value in wanted.items() for word in (f"--{name}", str(value))]


HEAD = """\
#!/bin/bash
# Written by megatron-k2 launch. Submit it again for a job that waits for this one (singleton).
{header}
set -uo pipefail

save={save}
last_step={steps}
mkdir -p "$save"

# megatron_k2/launch/environment.py says why.
{exports}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

flags=(
  {flags}
)

step_saved() {{ cat "$save/{tracker}" 2>/dev/null || echo 0; }}
before=$(step_saved)
"""

TEMPLATE = """\
{head}

# Before the time limit Slurm signals this script, which asks every rank to save and end
# (--exit-signal-handler). Before preemption it asks the ranks itself; the node check has nothing
# to save and ends with an error, so Slurm is asked why.
near_limit=0
trap 'near_limit=1 interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
is_preempted() {{ [[ $(scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]; }}

on_every_rank() {{
  {srun} bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec "$@"' task {python} -m "$@" &
  local ranks=$! ended
  while true; do
    interrupted=0
    wait "$ranks"
    ended=$?
    [ "$interrupted" -eq 1 ] || return "$ended"  # a signal ends wait, not the ranks
  done
}}

on_every_rank megatron_k2.launch.node_check {check} "${{flags[@]}}" &&
  [ "$near_limit" -eq 0 ] &&
  on_every_rank {program} "${{flags[@]}}"
status=$?

saved=$(step_saved)
if [ "$status" -eq 0 ] && [ "$saved" -ge "$last_step" ]; then
  echo "done: $last_step steps"
elif is_preempted || {{ [ "$status" -eq 0 ] && [ "$saved" -gt "$before" ]; }}; then
  echo "saved at step $saved of $last_step: queued again"
  exec scontrol requeue "$SLURM_JOB_ID"
elif [ "$saved" -le "$before" ] && {{ [ "$status" -eq 0 ] || [ "$near_limit" -eq 1 ]; }}; then
  echo "ended at step $saved of $last_step without a new checkpoint" >&2
  exit 1
else
  exit "$status"
fi
"""


def submit(script: str, save: str, after: str | None = None) -> str:
    """Write the script beside the run and give it to sbatch; returns the job's number.

    Args:
        script: from ``render``.
        save: the run's directory.
        after: a job that must have ended well before.

    Raises:
        UserError: without sbatch, or with its own words where it refuses.
    """
    more = []
    if after is not None:  # a dependency named here replaces the script's
        more = [f"--dependency=singleton,afterok:{after}", "--kill-on-invalid-dep=yes"]
    return give_to_sbatch(script, save, "job.sbatch", more)
