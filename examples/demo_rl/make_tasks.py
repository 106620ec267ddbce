"""Task sets for ``run.sh``: ``make_tasks.py OUT``; questions of ``demo_sft``, other arguments."""

import json
import random
import sys
from pathlib import Path

from domains import Calls, Documented
from make_set import TOOLS, documented, drawn, turns

from megatron_k2.gym.protocol import Task
from megatron_k2.gym.task_sets import write_set
from megatron_k2.records.read import tools_from

NUM_CALLS, NUM_HELD_OUT = 320, 64


def call_tasks() -> list[Task]:
    """Arguments that fine-tuning held out as well: nothing of them was learnt by heart."""
    order, found = random.Random(5), {}
    while len(found) < NUM_CALLS:
        tool = order.choice(TOOLS)  # of some there are fewer arguments than of others
        question, _, result, _ = turns(tool, drawn(tool, order, held_out=True), 0)
        declared = tools_from([tool.declaration()])
        reference = {"result": result["content"]}
        task = Task(Calls.name, question["content"], reference, tools=declared)
        found.setdefault(task.id, task)
    return list(found.values())


def documented_tasks() -> list[Task]:
    """Every function that fine-tuning told of."""
    return [
        Task(Documented.name, row["messages"][0]["content"], {"text": row["messages"][1]["content"]})
        for row in documented()
    ]


def main(out: Path) -> None:
    """Two sets and the file that names them."""
    sets = {"calls": call_tasks(), "documented": documented_tasks()}
    for name, tasks in sets.items():
        if not (out / name / "card.json").exists():
            write_set(out / name, tasks, "Apache-2.0", {"made by": "examples/demo_rl"})
    rows = [
        {
            "name": name, "tasks": name, "max_tokens": 96, "held_out": NUM_HELD_OUT,
            "temperature": "linear:1.0:0.8:40",
        }
        for name in sets
    ]  # fmt: skip
    (out / "task_sets.json").write_text(json.dumps({"task_sets": rows}, indent=1) + "\n")
    print(", ".join(f"{name} {len(tasks)} tasks" for name, tasks in sets.items()))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]))
