"""Task sets on disk: a folder of ``tasks.jsonl`` and ``card.json``, both whole or absent.

The card holds what a set must be known by: the hash of its content, its licence, and its lineage
(generator, seed, versions, or the set it was made from). A set whose tasks no longer have the hash
is refused.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_files, sync_directory, write_atomically
from megatron_k2.gym.protocol import SCHEMA_VERSION, Task, task_from
from megatron_k2.records.read import read_json_line

TASKS, CARD = "tasks.jsonl", "card.json"


@dataclass(frozen=True)
class SetCard:
    """What a set is known by."""

    licence: str
    """An SPDX identifier, or a sentence."""
    lineage: dict[str, Any]
    """How it came to be."""
    content_sha256: str = ""
    num_tasks: int = 0
    schema_version: int = SCHEMA_VERSION
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that made it."""


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions, of those that are."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_set(
    folder: Path, tasks: Sequence[Task], licence: str, lineage: dict[str, Any]
) -> SetCard:
    """Write a set into a new folder; the card last, so that a set with one is whole.

    Raises:
        UserError: the folder holds a set, tasks share an id, or there is none.
    """
    if (folder / CARD).exists():
        raise UserError(f"{folder} holds a task set; choose a new folder")
    if not tasks:
        raise UserError("a task set without tasks")
    ids = [task.id for task in tasks]
    if len(set(ids)) < len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise UserError(f"two tasks have the id {twice!r}; a set's tasks are distinct")
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(task.as_json(), ensure_ascii=False) + "\n" for task in tasks)
    write_atomically(folder / TASKS, "".join(lines).encode())
    card = SetCard(
        licence,
        lineage,
        sha256_of_files([folder / TASKS]),
        len(tasks),
        versions=versions_of("megatron-k2", "reasoning-gym", "math-verify"),
    )
    write_atomically(folder / CARD, json.dumps(asdict(card), indent=1).encode())
    sync_directory(folder)
    return card


def read_set(folder: Path) -> tuple[SetCard, list[Task]]:
    """A set's card and tasks.

    Raises:
        UserError: no set, a line that is no task, or another content than the card says.
    """
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} holds no task set: {CARD} is missing")
    card = SetCard(**json.loads((folder / CARD).read_text("utf-8")))
    found = sha256_of_files([folder / TASKS])
    if found != card.content_sha256:
        raise UserError(
            f"{folder / TASKS} has changed: {found[:12]}, not {card.content_sha256[:12]}"
        )
    return card, list(read_tasks(folder / TASKS))


def read_tasks(path: Path) -> list[Task]:
    """Tasks of a file, one a line.

    Raises:
        UserError: no such file, or a line that is no task.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected one task a line, as JSON")
    tasks = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tasks.append(task_from(read_json_line(line)))
        except ValueError as problem:
            raise UserError(f"{path}:{number}: {problem}") from None
    return tasks
