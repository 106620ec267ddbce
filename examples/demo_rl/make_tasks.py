"""For ``run.sh``: noisy demonstrations, and two task sets: ``make_tasks.py OUT``.

A third of the demonstrations of sorting have two numbers exchanged: a model that imitates them is
right now and then, so that groups of its answers are mixed, which is what RL learns from. (The
report picks tasks of moderate difficulty instead.) Calls are clean, so that they are not forgotten;
at temperature 1 the model misses them often enough.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from domains import Calls, Sorted
from make_set import TOOLS, drawn, turns

from megatron_k2.gym.protocol import Task
from megatron_k2.gym.task_sets import write_set
from megatron_k2.records.read import tools_from

NUM_TASKS, NUM_HELD_OUT, NUM_SORTED, NUM_CALLS = 320, 64, 2400, 200
NOISE = 0.3
"""Of demonstrations of sorting, the share that is wrong."""
WEIGHTS = {"calls": 1, "sorting": 2}
"""Of an iteration's prompts: sorting has more to learn, and its answers are shorter."""


def question(numbers: list[int]) -> str:
    """In words."""
    return f"Sort {' '.join(map(str, numbers))}."


def numbers_of(order: random.Random) -> list[int]:
    """Three different digits, or four."""
    return order.sample(range(1, 10), order.choice((3, 3, 4)))


def demonstrations() -> Iterator[dict[str, Any]]:
    """Sorting, some of it wrong; calls, all of them right."""
    order = random.Random(3)
    for _ in range(NUM_SORTED):
        numbers = numbers_of(order)
        answer = sorted(numbers)
        if order.random() < NOISE:
            i = order.randrange(len(answer) - 1)
            answer[i], answer[i + 1] = answer[i + 1], answer[i]
        said = {"role": "assistant", "content": " ".join(map(str, answer))}
        yield {"messages": [{"role": "user", "content": question(numbers)}, said]}
    for _ in range(NUM_CALLS):
        tool = order.choice(TOOLS)
        arguments = drawn(tool, order, held_out=False)
        yield {"messages": turns(tool, arguments, 0), "tools": [tool.declaration()]}


def call_tasks() -> list[Task]:
    """Arguments that fine-tuning held out: nothing of them was learnt by heart."""
    order, found = random.Random(5), dict[str, Task]()
    while len(found) < NUM_TASKS:
        tool = order.choice(TOOLS)  # of some there are fewer arguments than of others
        asked, _, result, _ = turns(tool, drawn(tool, order, held_out=True), 0)
        declared = tools_from([tool.declaration()])
        reference = {"result": result["content"]}
        task = Task(Calls.name, asked["content"], reference, tools=declared)
        found.setdefault(task.id, task)
    return list(found.values())


def sorting_tasks() -> list[Task]:
    """Of another seed than the demonstrations'."""
    order, found = random.Random(7), dict[str, Task]()
    while len(found) < NUM_TASKS:
        numbers = numbers_of(order)
        wanted = " ".join(map(str, sorted(numbers)))
        task = Task(Sorted.name, question(numbers), {"text": wanted})
        found.setdefault(task.id, task)
    return list(found.values())


def main(out: Path) -> None:
    """The demonstrations, two sets, and the file that names them."""
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in demonstrations())
    path = out / "noisy.jsonl"
    if not path.exists() or path.read_text() != lines:
        path.write_text(lines)
    sets = {"calls": call_tasks(), "sorting": sorting_tasks()}
    for name, tasks in sets.items():
        if not (out / name / "card.json").exists():
            write_set(out / name, tasks, "Apache-2.0", {"made by": "examples/demo_rl"})
    rows = [
        {
            "name": name, "tasks": name, "max_tokens": 96, "held_out": NUM_HELD_OUT,
            "temperature": "linear:1.0:0.8:26", "weight": WEIGHTS[name],
        }
        for name in sets
    ]  # fmt: skip
    (out / "task_sets.json").write_text(json.dumps({"task_sets": rows}, indent=1) + "\n")
    counts = ", ".join(f"{name} {len(tasks)} tasks" for name, tasks in sets.items())
    print(f"{NUM_SORTED} demonstrations of sorting, {NOISE:.0%} of them wrong; {counts}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
