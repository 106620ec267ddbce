"""A job array: one command over many shards, each a task that goes on where it was.

A task needs no GPU and no other task. Before its time limit Slurm signals the script, which asks
the program to stop; a task that has stopped queues itself again. Lost nodes are Slurm's to requeue.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.launch.cluster import Cluster

STOPPED = 130
"""A program's exit code where it stopped because it was asked to."""
SHARD = '"$SLURM_ARRAY_TASK_ID"'
"""A task's number, in the script's own words."""
TEMPLATE = """\
#!/bin/bash
# Written by megatron-k2. Each task is a shard; the same command submits what is left.
{header}
set -uo pipefail
{exports}
{program} {shard} {flags} &
program=$!
trap 'kill -TERM "$program"' USR1 TERM
while true; do
  wait "$program"
  status=$?
  kill -0 "$program" 2>/dev/null || break  # a signal ends wait, not the program
done
if [ "$status" -eq {stopped} ]; then
  exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
"""


def render_array(
    name: str,
    folder: Path,
    words: Sequence[str],
    flags: Sequence[str],
    tasks: Sequence[int],
    cluster: Cluster,
) -> str:
    """The sbatch script.

    Args:
        name: of the job.
        folder: of the work; logs go below it.
        words: of the program, after ``python``; a task's number follows.
        flags: after that.
        tasks: numbers of the array.
        cluster: account, queue, image, environment.
    """
    options = {
        "job-name": name,
        "account": cluster.account,
        "partition": cluster.partition,
        "array": ",".join(map(str, tasks)),
        "ntasks": 1,
        "cpus-per-task": 1,
        "time": cluster.time,
        "output": f"{folder.resolve()}/slurm/%A_%a.log",
        "open-mode": "append",
        "requeue": "",
        "signal": f"B:USR1@{cluster.seconds_to_save}",
    }
    header = [
        f"#SBATCH --{key}" + (f"={shlex.quote(str(value))}" if value != "" else "")
        for key, value in options.items()
        if value is not None
    ]
    start = [cluster.python, *words]
    if cluster.container:
        mounts = [f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else []
        start = ["srun", f"--container-image={cluster.container}", *mounts, *start]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in cluster.environment]
    return TEMPLATE.format(
        header="\n".join(header),
        exports="\n".join(exports),
        program=shlex.join(start),
        shard=SHARD,
        flags=shlex.join(flags),
        stopped=STOPPED,
    )
