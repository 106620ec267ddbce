"""Several task sets in one run, from a JSON file: tasks, weight, budget, temperature, reward.

    {"task_sets": [
      {"name": "sums", "generator": "mathematics/sum_of_fractions", "number": 400, "seed": 7,
       "weight": 2, "max_tokens": 128, "temperature": "linear:1.0:0.7:100", "held_out": 32},
      {"name": "calendar", "tasks": "sets/calendar", "max_tokens": 512, "penalty": 0.25}
    ]}

The report trains on all kinds of tasks jointly, with budgets by task type (section 3.2.3); in which
proportions is not stated. Held-out tasks are those whose ids hash lowest, so that a set written in
another order holds out the same.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.gym.protocol import Domain, Task
from megatron_k2.gym.registry import generator_named, nearest, open_domain
from megatron_k2.gym.task_sets import read_set, read_tasks
from megatron_k2.rewards.budget import PENALTY, Budget
from megatron_k2.rl.schedule import Temperature, Toggle

RewardKind = Literal["verifiable", "rubric"]
FIELDS = (
    *("name", "tasks", "generator", "number", "seed", "weight", "max_tokens", "penalty"),
    *("temperature", "reward", "held_out", "toggle"),
)


@dataclass(frozen=True)
class TaskSet:
    """One kind of task in a run.

    Raises:
        UserError: no task to train on, two of one id, or a weight that is not more than 0.
    """

    name: str
    tasks: tuple[Task, ...]
    """To train on, each with its budget."""
    budget: Budget
    weight: float = 1.0
    """Its share of prompts, against the other sets' weights."""
    temperature: Temperature = Temperature(1.0, 1.0)  # noqa: RUF009 - frozen
    reward: RewardKind = "verifiable"
    held_out: tuple[Task, ...] = ()
    """Never trained on."""
    toggle: Toggle | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError(f"task set {self.name!r} has no task to train on; give it some")
        ids = [task.id for task in (*self.tasks, *self.held_out)]
        if len(set(ids)) < len(ids):
            twice = next(each for each in ids if ids.count(each) > 1)
            raise UserError(f"task set {self.name!r}: two tasks have the id {twice!r}")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"task set {self.name!r}: weight {self.weight}; expected more than 0")

    @property
    def fingerprint(self) -> str:
        """Of what may not change while a run goes on: which prompts there are, and which not."""
        ids = [[task.id for task in tasks] for tasks in (self.tasks, self.held_out)]
        return sha256_of_json([self.name, self.weight, ids])[:16]


def task_set_of(
    name: str, tasks: list[Task], budget: Budget, num_held_out: int = 0, **options: Any
) -> TaskSet:
    """A set whose tasks have the budget where they have none of their own, some of them held out.

    Raises:
        UserError: none would be left; see ``TaskSet`` too.
    """
    distinct = list({task.id: task for task in tasks}.values())
    if num_held_out >= len(distinct):
        raise UserError(
            f"task set {name!r}: held_out {num_held_out} of {len(distinct)} distinct tasks leaves "
            "none to train on; hold out fewer"
        )
    ready = [
        replace(task, budget_tokens=task.budget_tokens or budget.max_tokens) for task in distinct
    ]
    by_hash = sorted(ready, key=lambda task: sha256_of_json(["held out", task.id]))
    held_out = tuple(by_hash[:num_held_out])
    away = {task.id for task in held_out}
    kept = tuple(task for task in ready if task.id not in away)
    return TaskSet(name, kept, budget, held_out=held_out, **options)


def read_task_sets(path: Path) -> tuple[TaskSet, ...]:
    """The sets of a file; paths in it are from its folder.

    Raises:
        UserError: no such file, not of this form, or a set that cannot be had.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))["task_sets"]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise TypeError
    except OSError as problem:
        raise UserError(f"{path}: {problem.strerror}; expected a file of task sets") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path}: expected {{"task_sets": [{{"name": ..., ...}}, ...]}}') from None
    found = tuple(_task_set(row, path) for row in rows)
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise UserError(
            f"{path}: task sets {', '.join(names)}; expected a name of its own for each"
        )
    return found


def _task_set(row: Mapping[str, Any], path: Path) -> TaskSet:
    for field in row:
        if field not in FIELDS:
            raise nearest(field, list(FIELDS), f"field of a task set ({path})")
    name = row.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: a task set without a name")
    reward = row.get("reward", "verifiable")
    if reward not in get_args(RewardKind):
        raise UserError(
            f"{path}: {name}: reward {reward!r}; one of {', '.join(get_args(RewardKind))}"
        )
    try:
        return task_set_of(
            name,
            _tasks(row, path),
            Budget(int(row["max_tokens"]), float(row.get("penalty", PENALTY))),
            int(row.get("held_out", 0)),
            weight=float(row.get("weight", 1.0)),
            temperature=Temperature.parse(str(row.get("temperature", "1.0"))),
            reward=reward,
            toggle=Toggle(**row["toggle"]) if row.get("toggle") else None,
        )
    except KeyError as missing:
        raise UserError(f"{path}: {name}: {missing} is missing") from None
    except TypeError as problem:
        raise UserError(f"{path}: {name}: {problem}") from None


def _tasks(row: Mapping[str, Any], path: Path) -> list[Task]:
    if ("tasks" in row) == ("generator" in row):
        raise UserError(f"{path}: {row['name']}: expected either tasks or generator")
    if "tasks" in row:
        place = path.parent / str(row["tasks"])
        return read_set(place)[1] if place.is_dir() else read_tasks(place)
    generator = generator_named(str(row["generator"]))
    return list(generator.sample(int(row["number"]), int(row.get("seed", 0))))


async def open_domains(
    task_sets: Sequence[TaskSet],
    *,
    sandbox: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Domain]:
    """The domains of all tasks, by name; the caller closes them.

    Args:
        task_sets: of the run.
        sandbox: back-end by name, for those that run programs.
        tell: is called with what takes time.

    Raises:
        UserError: see ``gym.registry.open_domain``.
    """
    names = domain_names(task_sets)
    return {name: await open_domain(name, sandbox=sandbox, tell=tell) for name in names}


def domain_names(task_sets: Sequence[TaskSet]) -> list[str]:
    """Of all tasks, those held out too."""
    tasks = (task for each in task_sets for task in (*each.tasks, *each.held_out))
    return sorted({task.domain for task in tasks})
