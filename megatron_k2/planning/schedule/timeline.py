"""The schedule with everything a GPU does beside arithmetic: a discrete-event simulation.

Each unit of ``pipeline.py`` becomes tasks on the lanes of its rank, after the report's section
2.4.3 and Figure 7: arithmetic (attention, MLP, weight gradients), expert all-to-all (dispatch and
combine, and their transposes backward), pipeline sends, copies to the host and back. A lane works
in its given order; a task starts when its lane is free and what it needs has ended.

Where the extra warm-up micro-batch makes the forward and the backward of a steady-state pair
independent, their tasks are interleaved so that one's all-to-all runs under the other's arithmetic:

    arithmetic   F attention | B MLP | F MLP | B attention | B weight gradients
    all-to-all   B combine | F dispatch | B dispatch | F combine

A chunk's layers are taken together, so a chunk has one attention and one MLP.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_k2.planning.schedule.pipeline import ScheduleShape, Unit, num_warmup, rank_order

Lane = Literal["arithmetic", "all-to-all", "pipeline", "to host", "from host"]
LANES: tuple[Lane, ...] = ("arithmetic", "all-to-all", "pipeline", "to host", "from host")


@dataclass(frozen=True)
class ChunkCost:
    """Seconds of one micro-batch on one chunk, by task."""

    attention_forward: float
    mlp_forward: float
    attention_backward: float
    """Gradients of attention's inputs, what is computed again included."""
    mlp_backward: float
    """Gradients of the MLP's inputs, what is computed again included."""
    weight_gradients: float
    dispatch: float
    """The all-to-all to the experts; the combine and both backward take as long."""
    send: float
    """One transfer to the next chunk, in either direction."""
    offload: float = 0.0
    """Activations to the host, and as long back."""


@dataclass(eq=False)
class Task:
    """One thing on one lane; ``start`` and ``end`` are set by ``run``."""

    rank: int
    lane: Lane
    name: str
    unit: Unit
    seconds: float
    needs: "list[Task]" = field(default_factory=list, repr=False)
    start: float = -1.0
    end: float = -1.0


def build(shape: ScheduleShape, costs: Sequence[ChunkCost]) -> list[list[Task]]:
    """Every lane's tasks in order, dependencies set.

    Args:
        shape: of the schedule.
        costs: of the ``p v`` chunks in the forward's order.
    """
    tasks: dict[tuple[Unit, int, str], Task] = {}
    lanes: dict[tuple[int, Lane], list[Task]] = defaultdict(list)
    for rank in range(shape.pp):
        for group in _groups(shape, rank):
            for lane, name, unit in _ordered(group):
                cost = costs[unit.virtual * shape.pp + rank]
                seconds = _seconds(cost, unit.kind, name)
                task = Task(rank, lane, name, unit, seconds)
                tasks[unit, rank, name] = task
                lanes[rank, lane].append(task)
    for (unit, rank, name), task in tasks.items():
        task.needs = [tasks[key] for key in _needs(shape, unit, rank, name) if key in tasks]
    _limit_prefetch(lanes, shape.pp)
    return list(lanes.values())


def _groups(shape: ScheduleShape, rank: int) -> list[tuple[Unit, ...]]:
    """Units that share the lanes at one time: a pair in the steady state, else one alone."""
    order = rank_order(shape, rank)
    warmup = num_warmup(shape, rank)
    steady = 2 * (shape.num_microbatches * shape.vpp - warmup)
    groups: list[tuple[Unit, ...]] = [(unit,) for unit in order[:warmup]]
    pairs = order[warmup : warmup + steady]
    if shape.has_extra_warmup:
        groups += [(pairs[i], pairs[i + 1]) for i in range(0, steady, 2)]
    else:
        groups += [(unit,) for unit in pairs]
    return groups + [(unit,) for unit in order[warmup + steady :]]


_FORWARD: tuple[tuple[Lane, str], ...] = (
    ("arithmetic", "attention"),
    ("all-to-all", "dispatch"),
    ("arithmetic", "MLP"),
    ("all-to-all", "combine"),
    ("pipeline", "send"),
    ("to host", "offload"),
)
_BACKWARD: tuple[tuple[Lane, str], ...] = (
    ("from host", "onload"),
    ("all-to-all", "combine"),
    ("arithmetic", "MLP"),
    ("all-to-all", "dispatch"),
    ("arithmetic", "attention"),
    ("pipeline", "send"),
    ("arithmetic", "weight gradients"),
)
_PAIR: tuple[tuple[str, int], ...] = (
    *(("B", 0), ("B", 1), ("F", 0), ("F", 1), ("B", 2), ("B", 3), ("F", 2), ("F", 3), ("F", 4)),
    *(("F", 5), ("B", 4), ("B", 5), ("B", 6)),
)
"""(kind, index into its tasks): the module's two lines of interleaving, lane by lane."""


def _ordered(group: tuple[Unit, ...]) -> list[tuple[Lane, str, Unit]]:
    if len(group) == 1:
        unit = group[0]
        return [(*task, unit) for task in (_FORWARD if unit.kind == "F" else _BACKWARD)]
    forward, backward = group
    return [
        (*_FORWARD[index], forward) if kind == "F" else (*_BACKWARD[index], backward)
        for kind, index in _PAIR
    ]


def _seconds(cost: ChunkCost, kind: str, name: str) -> float:
    if name in ("dispatch", "combine"):
        return cost.dispatch
    if name == "send":
        return cost.send
    if name in ("offload", "onload"):
        return cost.offload
    if name == "weight gradients":
        return cost.weight_gradients
    if kind == "F":
        return cost.attention_forward if name == "attention" else cost.mlp_forward
    return cost.attention_backward if name == "attention" else cost.mlp_backward


def _needs(shape: ScheduleShape, unit: Unit, rank: int, name: str) -> list[tuple[Unit, int, str]]:
    """What must have ended: the task before in its unit, and the send that brought the input."""
    sequence = [task for _, task in (_FORWARD if unit.kind == "F" else _BACKWARD)]
    index = sequence.index(name)
    found = []
    if name in ("send", "offload") and unit.kind == "F":
        found.append((unit, rank, "combine"))
    elif name == "send" or name == "weight gradients":
        found.append((unit, rank, "attention"))
    elif name == "onload":
        found.append((Unit("F", unit.microbatch, unit.virtual), rank, "offload"))
    elif index > 0:
        found.append((unit, rank, sequence[index - 1]))
    chunk = unit.virtual * shape.pp + rank
    if unit.kind == "F" and name == "attention" and chunk > 0:
        found.append((_at(shape, unit, chunk - 1), (chunk - 1) % shape.pp, "send"))
    if unit.kind == "B" and name == "combine":
        found.append((Unit("F", unit.microbatch, unit.virtual), rank, "combine"))
        if chunk < shape.pp * shape.vpp - 1:
            found.append((_at(shape, unit, chunk + 1), (chunk + 1) % shape.pp, "send"))
    return found


def _at(shape: ScheduleShape, unit: Unit, chunk: int) -> Unit:
    return Unit(unit.kind, unit.microbatch, chunk // shape.pp)


def _limit_prefetch(lanes: dict[tuple[int, Lane], list[Task]], num_ranks: int) -> None:
    """Activations come back at most one backward ahead of their use (report 2.4.4)."""
    for rank in range(num_ranks):
        onloads = lanes[rank, "from host"]
        ends = [
            task
            for task in lanes[rank, "arithmetic"]
            if task.unit.kind == "B" and task.name == "attention"
        ]
        for i, onload in enumerate(onloads[2:]):
            onload.needs.append(ends[i])


def run(lanes: list[list[Task]]) -> list[Task]:
    """Set every task's start and end; the tasks by start."""
    waiting: dict[int, list[int]] = defaultdict(list)
    position, free = [0] * len(lanes), [0.0] * len(lanes)
    ready = list(range(len(lanes)))
    while ready:
        lane = ready.pop()
        while position[lane] < len(lanes[lane]):
            task = lanes[lane][position[lane]]
            missing = next((need for need in task.needs if need.end < 0), None)
            if missing is not None:
                waiting[id(missing)].append(lane)
                break
            arrived = max((need.end for need in task.needs), default=0.0)
            task.start = max(free[lane], arrived)
            task.end = free[lane] = task.start + task.seconds
            position[lane] += 1
            ready += waiting.pop(id(task), [])
    tasks = [task for lane in lanes for task in lane]
    if any(task.end < 0 for task in tasks):
        raise RuntimeError("the timeline waits for itself")
    return sorted(tasks, key=lambda task: (task.start, task.rank))


def simulate_tasks(shape: ScheduleShape, costs: Sequence[ChunkCost]) -> list[Task]:
    """``run(build(…))``: one step's pipeline, by start."""
    return run(build(shape, costs))


def span(tasks: Sequence[Task]) -> float:
    """End of the last task."""
    return max(task.end for task in tasks)


def exposed(tasks: Sequence[Task], lane: Lane) -> float:
    """Seconds, over all ranks, in which a rank's ``lane`` works and its arithmetic does not."""
    total = 0.0
    ours: dict[int, list[Task]] = defaultdict(list)
    busy: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        if task.lane == lane:
            ours[task.rank].append(task)
        elif task.lane == "arithmetic":
            busy[task.rank].append(task)
    for rank, here in ours.items():
        first = 0
        for task in here:  # both lists are in order of time, and neither overlaps itself
            while first < len(busy[rank]) and busy[rank][first].end <= task.start:
                first += 1
            total += task.seconds
            for other in busy[rank][first:]:
                if other.start >= task.end:
                    break
                total -= min(other.end, task.end) - max(other.start, task.start)
    return total
