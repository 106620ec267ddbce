"""One step's timeline as a file that Perfetto and Chrome's tracing page read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.planning.estimate import Assumptions, chunk_costs, schedule_shape
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.schedule.timeline import LANES, Task, simulate_tasks

MOST_MICROBATCHES = 4
"""Times the pipeline ranks: a longer step repeats its middle, so that many are shown."""


def step_lanes(r: RunRequest, a: Assumptions) -> list[Task]:
    """The run's step, or a shorter one of the same schedule."""
    shown = min(r.num_microbatches, MOST_MICROBATCHES * max(r.pp, 2))
    return simulate_tasks(schedule_shape(r, shown), chunk_costs(r, a))


def trace_events(tasks: Sequence[Task]) -> list[dict[str, object]]:
    """Chrome's trace events: a process a pipeline rank, a thread a lane, microseconds."""
    events: list[dict[str, object]] = []
    for rank in sorted({task.rank for task in tasks}):
        name = {"name": f"pipeline rank {rank}"}
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": name})
        events += [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": i, "args": {"name": lane}}
            for i, lane in enumerate(LANES)
        ]
    for task in tasks:
        if task.seconds == 0:
            continue
        unit = task.unit
        events.append(
            {
                "ph": "X",
                "name": f"{unit.kind} {task.name} {unit.microbatch}.{unit.virtual}",
                "cat": "forward" if unit.kind == "F" else "backward",
                "pid": task.rank,
                "tid": LANES.index(task.lane),
                "ts": task.start * 1e6,
                "dur": task.seconds * 1e6,
                "args": {"micro_batch": unit.microbatch, "virtual_stage": unit.virtual},
            }
        )
    return events


def write_trace(path: Path, tasks: Sequence[Task]) -> None:
    """Write under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump({"traceEvents": trace_events(tasks), "displayTimeUnit": "ms"}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
