"""``megatron-k2 gym difficulty`` and ``page``: how hard tasks are for a model, and its answers."""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_k2.cli.endpoint import add_model, connected

if TYPE_CHECKING:
    from megatron_k2.gym.protocol import Domain, Task
    from megatron_k2.records.rollouts import Rollout

ROLLOUTS, SETTINGS = "rollouts.jsonl", "settings.json"


def add_verbs(verbs: Any) -> None:
    """The two verbs' flags."""
    difficulty = verbs.add_parser(
        "difficulty",
        help="pass@k of a model on a task set, and the tasks of a middle band as a new set",
        description="Interrupted, the same command goes on where it was.",
    )
    difficulty.add_argument("set", type=Path, metavar="DIR", help="a task set")
    difficulty.add_argument("--endpoint", metavar="URL", required=True, help="of the model")
    add_model(difficulty)
    add = difficulty.add_argument
    add("--number", type=int, default=8, help="answers to each task (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="(default %(default)s)")
    add("--max-tokens", type=int, default=4096, help="of a turn (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--band", default="0.1:0.9", metavar="LOW:HIGH", help="pass rates kept (default 0.1:0.9)")
    add("--concurrency", type=int, default=64, help="episodes at one time (default %(default)s)")
    add("--sandbox", help="back-end for programs; default: the strongest")
    add("--output", type=Path, metavar="DIR", required=True, help="rollouts, and the new set")
    page = verbs.add_parser("page", help="tasks, answers and evidence as one HTML file")
    page.add_argument("rollouts", type=Path, metavar="FILE.jsonl")
    page.add_argument("--output", type=Path, metavar="FILE.html", required=True)


def page(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from megatron_k2.files import write_atomically
    from megatron_k2.run.report.page import trajectories_page

    rows = [each.to_object() for each in read_rollouts(arguments.rollouts)]
    title = f"{arguments.rollouts.name}: {len(rows)} trajectories"
    write_atomically(arguments.output, trajectories_page(title, rows).encode())
    print(f"{arguments.output}: {len(rows)} trajectories")
    return 0


def read_rollouts(path: Path, *, may_be_torn: bool = False) -> "list[Rollout]":
    """Rollouts of a file.

    Raises:
        UserError: no such file, or a line that is none, but for a torn last one where that is said.
    """
    from megatron_k2.errors import UserError
    from megatron_k2.records.read import read_json_line
    from megatron_k2.records.rollouts import rollout_from

    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a rollout a line, as JSON")
    found = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if may_be_torn and number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            found.append(rollout_from(read_json_line(line)))
        except ValueError as problem:
            raise UserError(f"{path}:{number}: {problem}") from None
    return found


def difficulty(arguments: argparse.Namespace) -> int:
    """Measure, and write the set."""
    return asyncio.run(_difficulty(arguments))


async def _difficulty(arguments: argparse.Namespace) -> int:
    from megatron_k2.errors import UserError
    from megatron_k2.gym.difficulty import in_band, measured, passed
    from megatron_k2.gym.task_sets import CARD, read_set, write_set

    card, tasks = read_set(arguments.set)
    band = _band(arguments.band)
    if (arguments.output / CARD).exists():
        raise UserError(f"{arguments.output} holds a task set; choose a new folder")
    async with AsyncExitStack() as stack:
        client, model = await connected(arguments, arguments.concurrency)
        stack.push_async_callback(client.close)
        settings = {
            "set": card.content_sha256, "model": model, "number": arguments.number,
            "temperature": arguments.temperature, "max_tokens": arguments.max_tokens,
            "seed": arguments.seed,
        }  # fmt: skip
        found = await _played(arguments, tasks, client, settings, stack)
    counts = passed(found)
    hard = measured(tasks, counts)
    kept = in_band(hard, band)
    _print(counts, len(tasks), len(kept), band)
    if not kept:
        raise UserError(f"no task has a pass rate of {arguments.band}; widen --band")
    lineage = {"from": card.lineage, "difficulty": settings, "band": list(band)}
    write_set(arguments.output, kept, card.licence, lineage)
    print(f"{arguments.output}: {len(kept)} tasks")
    return 0


async def _played(
    arguments: argparse.Namespace,
    tasks: "list[Task]",
    client: Any,
    settings: dict[str, Any],
    stack: AsyncExitStack,
) -> "list[Rollout]":
    from megatron_k2.engine.remote.chat_policy import EndpointPolicy
    from megatron_k2.files import sha256_of_json
    from megatron_k2.gym.difficulty import sample
    from megatron_k2.gym.registry import open_domain

    found = _begun(arguments.output, settings)
    domains: dict[str, Domain] = {}
    for name in sorted({task.domain for task in tasks}):
        domains[name] = await open_domain(name, sandbox=arguments.sandbox)
        stack.push_async_callback(domains[name].close)

    def policy_of(task: "Task", place: int) -> EndpointPolicy:
        seed = int(sha256_of_json([arguments.seed, task.id, place])[:8], 16)
        return EndpointPolicy(
            client,
            settings["model"],
            temperature=arguments.temperature,
            max_tokens=arguments.max_tokens,
            seed=seed,
        )

    done = Counter(each.task_id for each in found)
    with (arguments.output / ROLLOUTS).open("a", encoding="utf-8") as out:
        await sample(
            policy_of,
            domains,
            tasks,
            arguments.number,
            done=done,
            concurrency=arguments.concurrency,
            keep=_keeper(out, found, len(tasks) * arguments.number),
        )
    return found


def _begun(folder: Path, settings: dict[str, Any]) -> "list[Rollout]":
    """What an interrupted run has left; the folder is made where there was none.

    Raises:
        UserError: it was begun with other settings.
    """
    from megatron_k2.errors import UserError
    from megatron_k2.files import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if not path.exists():
        write_atomically(path, json.dumps(settings, indent=1).encode())
        return []
    before = json.loads(path.read_text("utf-8"))
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        name = changed[0]
        raise UserError(
            f"{folder} was begun with {name} {before.get(name)!r}, now {settings[name]!r}; "
            "give the same, or another --output"
        )
    rollouts = folder / ROLLOUTS
    if not rollouts.exists():
        return []
    found = read_rollouts(rollouts, may_be_torn=True)
    write_atomically(rollouts, "".join(each.to_line() for each in found).encode())
    return found


def _keeper(out: TextIO, found: "list[Rollout]", total: int) -> "Callable[[Rollout], None]":
    begun, began = len(found), time.monotonic()

    def keep(rollout: "Rollout") -> None:
        out.write(rollout.to_line())
        out.flush()
        os.fsync(out.fileno())
        found.append(rollout)
        if sys.stderr.isatty():
            rate = (len(found) - begun) / max(time.monotonic() - began, 1e-9)
            left = (total - len(found)) / rate
            line = f"{len(found)} of {total} answers, {rate:.1f}/s, {left:.0f} s left"
            print(line, end="\n" if len(found) == total else "\r", file=sys.stderr)

    return keep


def _band(text: str) -> tuple[float, float]:
    from megatron_k2.errors import UserError

    try:
        low, high = (float(each) for each in text.split(":"))
    except ValueError:
        raise UserError(f"--band {text!r}: expected LOW:HIGH, two pass rates") from None
    if not 0 <= low <= high <= 1:
        raise UserError(f"--band {text}: expected 0 <= LOW <= HIGH <= 1")
    return low, high


def _print(
    counts: "dict[str, Any]", num_tasks: int, num_kept: int, band: tuple[float, float]
) -> None:
    judged = [each for each in counts.values() if each.num_judged]
    for k in (1, 2, 4, 8, 16, 32):
        found = [share for each in judged if (share := each.at(k)) is not None]
        if found:
            print(f"pass@{k}: {sum(found) / len(found):.1%} of {len(found)} tasks")
    num_unknown = sum(each.num_unknown for each in counts.values())
    low = sum(each.rate < band[0] for each in judged)
    high = sum(each.rate > band[1] for each in judged)
    print(
        f"{num_tasks} tasks: {num_kept} kept, {low} too hard, {high} too easy, "
        f"{num_tasks - len(judged)} without a verdict; {num_unknown} answers unknown"
    )
