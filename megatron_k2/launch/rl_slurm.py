"""Reinforcement learning with engines as one sbatch script: an allocation, overlapping steps.

| step | tasks | when it ends |
|---|---|---|
| ``trainer`` | one a GPU | the job ends: done, or queued again |
| ``supervisor`` | one a node with engines | it is started again on its node |
| ``gym`` | one a node of its own component, or of the trainer's | likewise |
| ``controller`` | one, beside rank 0 | rank 0 ends with it, and so the job |

They meet in ``<save>/rl/rendezvous/<job>.<restart>`` (``rl/cluster/rendezvous.py``). Each step
writes there which it is, so that the trainer alone is asked to save before the time limit, while
engines go on to answer. A run that is preempted, that has saved since its start, or that ended for
the first time without, is queued again; what is refused (2) or set off an alarm (3) is not.
"""

import json
import shlex

from megatron_k2.launch.cluster import Cluster
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.rl_engines import WEIGHTS, engines_file, engines_of, rl_nodes
from megatron_k2.launch.slurm import asked, check_arguments, container_words, head, header
from megatron_k2.launch.task_data import TaskData
from megatron_k2.planning.gpus import GPUS_PER_NODE
from megatron_k2.planning.rl.request import EngineLayout


def render_rl(
    recipe: Recipe,
    save: str,
    start_from: str | None,
    cluster: Cluster,
    nodes: int | None = None,
) -> str:
    """The sbatch script.

    Raises:
        UserError: see ``rl_nodes``; environments' nodes without engines' kind of job.
    """
    trainer, beside = rl_nodes(recipe, nodes)
    lines = header(recipe, cluster, save, trainer + beside)
    if cluster.gym_nodes:
        lines += ["#SBATCH hetjob", *asked(_gym_component(cluster))]
    e = engines_of(recipe)
    gyms = cluster.gym_nodes or (1 if recipe.is_cpu else trainer)
    data = recipe.data
    assert isinstance(data, TaskData)  # ``engines_file`` refuses others
    return TEMPLATE.format(
        engines=json.dumps(engines_file(recipe, save), indent=1),
        head=head(recipe, save, start_from, cluster, lines),
        srun=shlex.join(["srun", *container_words(cluster)]),
        python=shlex.quote(cluster.python),
        check=shlex.join(check_arguments(recipe)),
        trainer=shlex.join(_trainer_options(recipe, trainer)),
        supervisor=shlex.join(_supervisor_options(recipe, e, trainer, beside)),
        gym=shlex.join(_gym_options(cluster, recipe, gyms)),
        gyms=gyms,
        tasks=shlex.quote(f"{data.root}/{data.tasks}"),
        program=recipe.stage.module,
        weights=WEIGHTS,
    )


def _gym_component(cluster: Cluster) -> dict[str, object]:
    return {
        "account": cluster.account,
        "partition": cluster.gym_partition or cluster.partition,
        "nodes": cluster.gym_nodes,
        "ntasks-per-node": 1,
        "exclusive": "",
        "time": cluster.time,
    }


def _on(nodes: int, tasks: int, gpus: int, first: int = 0) -> list[str]:
    words = [f"--relative={first}"] if first else []
    words += [f"--nodes={nodes}", f"--ntasks={tasks}"]
    if gpus:
        words += [f"--ntasks-per-node={tasks // nodes}", f"--gpus-per-node={gpus}"]
    return words


def _trainer_options(recipe: Recipe, nodes: int) -> list[str]:
    ranks = recipe.layout.world_size
    gpus = 0 if recipe.is_cpu else ranks // nodes
    return [*_on(nodes, ranks, gpus), "--kill-on-bad-exit=1"]


def _supervisor_options(recipe: Recipe, e: EngineLayout, trainer: int, beside: int) -> list[str]:
    """A node of each task; on a CPU all tasks are one node's."""
    words = ["--kill-on-bad-exit=0", "--cpu-bind=none"]
    if recipe.is_cpu:
        return [*_on(1, e.nodes, 0), *words]
    if beside:
        return [*_on(beside, beside, GPUS_PER_NODE, first=trainer), *words]
    return [*_on(trainer, trainer, GPUS_PER_NODE), *words]


def _gym_options(cluster: Cluster, recipe: Recipe, gyms: int) -> list[str]:
    words = ["--kill-on-bad-exit=0", "--cpu-bind=none"]
    if cluster.gym_nodes:
        return ["--het-group=1", f"--ntasks={gyms}", *words]
    return [f"--nodes={gyms}", f"--ntasks={gyms}", *words]


TEMPLATE = """\
{head}

# Processes of this start meet here, and nowhere else: every start has a folder of its own.
meet="$save/rl/rendezvous/$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"
(umask 077 && mkdir -p "$meet" "$save/{weights}")
cat > "$meet/engines.json" <<'ENGINES'
{engines}
ENGINES
meeting=(--meet "$meet" --engines "$meet/engines.json" --gym {gyms})

# A step writes down which one it is, so that it alone can be signalled. Engines and environments
# heal in place: a task of theirs that ends is started again where it was, unless a supervisor
# gives up (2).
step() {{  # step NAME SRUN'S-OPTIONS... -- MODULE ARGUMENTS...
  local name=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  exec {srun} --overlap "${{options[@]}}" bash -c '
    name=$1 over=0
    shift
    [ "$SLURM_PROCID" -ne 0 ] || echo "$SLURM_JOB_ID.$SLURM_STEP_ID" > "$0/$name.step"
    trap "((over++))" TERM
    case $name in
      check | trainer)
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS ;;
      supervisor)  # its engines map memory themselves, and need no order of kernels
        unset PYTORCH_CUDA_ALLOC_CONF CUDA_DEVICE_MAX_CONNECTIONS ;;
      controller | gym)
        export CUDA_VISIBLE_DEVICES= ;;
    esac
    while [ "$over" -eq 0 ]; do
      "$@" &
      child=$!
      while true; do  # a signal ends wait, not the child
        told=$over
        wait "$child"
        ended=$?
        [ "$over" -gt "$told" ] || break
        kill -TERM "$child" 2>/dev/null
      done
      case $name.$ended in
        trainer.[23] | check.2) echo "$ended" > "$0/refused" ;;
      esac
      case $over.$name.$ended in
        0.supervisor.2) exit 2 ;;
        0.supervisor.* | 0.gym.*) ;;
        *.supervisor.* | *.gym.*) exit 0 ;;
        *) exit "$ended" ;;
      esac
      echo "$name $SLURM_PROCID ended with $ended: started again" >&2
      sleep 2
    done
    exit 143' "$meet" "$name" {python} -m "$@"
}}
signal_step() {{ [ ! -s "$meet/$1.step" ] || scancel --signal="$2" "$(cat "$meet/$1.step")"; }}

# Before the time limit Slurm signals this script, which asks the trainer to save and end; the
# others go on until it has. Before preemption Slurm asks all of them.
near_limit=0
trap 'near_limit=1 interrupted=1; signal_step check TERM; signal_step trainer TERM' USR1
is_preempted() {{ [[ $(scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]; }}

on_every_rank() {{  # on_every_rank check|trainer MODULE ARGUMENTS...
  local name=$1
  shift
  step "$name" {trainer} -- "$@" &
  local ranks=$! ended
  while true; do
    interrupted=0
    wait "$ranks"
    ended=$?
    [ "$interrupted" -eq 1 ] || return "$ended"  # a signal ends wait, not the ranks
  done
}}

services=()
start_services() {{
  step supervisor {supervisor} -- \\
    megatron_k2.rl.cluster.supervisor --meet "$meet" --engines "$meet/engines.json" &
  services+=($!)
  step gym {gym} -- \\
    megatron_k2.rl.cluster.gym_service --meet "$meet" --tasks {tasks} &
  services+=($!)
  step controller --nodes=1 --ntasks=1 --kill-on-bad-exit=0 -- \\
    megatron_k2.rl.cluster.controller "${{meeting[@]}}" "${{flags[@]}}" &
  services+=($!)
}}
end_services() {{
  local name
  for name in controller supervisor gym; do signal_step "$name" TERM; done
  for _ in {{1..60}}; do
    kill -0 "${{services[@]}}" 2>/dev/null || return 0
    sleep 0.5
  done  # what is left ends with the job
}}

on_every_rank check megatron_k2.launch.node_check {check} "${{flags[@]}}" &&
  [ "$near_limit" -eq 0 ] &&
  start_services &&
  on_every_rank trainer {program} "${{meeting[@]}}" "${{flags[@]}}"
status=$?
# Where one rank refuses, the others are ended, and srun tells of those.
[ ! -s "$meet/refused" ] || status=$(cat "$meet/refused")
[ "${{#services[@]}}" -eq 0 ] || end_services

saved=$(step_saved)
barren="$save/rl/barren"  # a start ended without a new checkpoint
[ "$saved" -le "$before" ] || rm -f "$barren"
again() {{
  echo "$1 at step $saved of $last_step: queued again"
  exec scontrol requeue "$SLURM_JOB_ID"
}}
if [ "$status" -eq 0 ] && [ "$saved" -ge "$last_step" ]; then
  echo "done: $last_step steps"
elif is_preempted; then
  again preempted
elif [ "$status" -eq 2 ] || [ "$status" -eq 3 ]; then
  exit "$status"
elif [ "$saved" -gt "$before" ]; then
  again "ended with $status"
elif [ "$near_limit" -eq 0 ] && [ ! -e "$barren" ]; then
  touch "$barren"
  again "ended with $status, without a new checkpoint,"
else
  echo "ended with $status at step $saved of $last_step without a new checkpoint" >&2
  [ "$status" -ne 0 ] || exit 1
  exit "$status"
fi
"""
