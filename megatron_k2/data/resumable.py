"""What every preparation of data shares: one at a time, part by part, resumed after a kill.

A preparation cuts its input into parts, and workers leave a file for each, whole or not at all. The
plan's record lies beside them: a rerun of the same plan goes on after the last finished part; a
rerun of another starts over and says what changed.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_k2.data.parts import Part
from megatron_k2.data.pool import work_on_parts
from megatron_k2.data.sources import SourceFile
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.lock.directory import hold

PARTS_DIRECTORY = ".parts"
TOKENIZER_DIRECTORY = "tokenizer"
PLAN_FILE = "plan.json"
MANIFEST_FILES = ("dataset.json", "chat.json")
"""Of a directory of text and of one of dialogues."""


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """One preparation at a time in a directory; the lock goes with the process, however it ends."""
    with hold(output, "a data preparation"):
        yield


def refuse_other_kind(output: Path, manifest_file: str) -> None:
    """Two kinds of dataset share names of files: one directory holds one kind.

    Raises:
        UserError: the directory holds the other.
    """
    for other in MANIFEST_FILES:
        if other != manifest_file and (output / other).is_file():
            raise UserError(f"{output} holds another kind of dataset ({other}); choose another")


def start_or_resume(
    record: dict[str, str],
    parts: Sequence[Part],
    output: Path,
    manifest_file: str,
    clear: Callable[[], None],
    console: Console,
) -> None:
    """Keep what an interrupted run of the same plan left; clear what any other left.

    Args:
        record: Hashes that make the plan, by the word that names each to a person.
        parts: Of the plan.
        output: The directory.
        manifest_file: Its manifest, which goes first so that a half-cleared directory never looks
            complete.
        clear: Removes everything else that a finished run left.
        console: For the line that says which.
    """
    for leftover in output.glob(".*.partial*"):
        leftover.unlink()
    plan_path = output / PARTS_DIRECTORY / PLAN_FILE
    if plan_path.is_file():
        previous = json.loads(plan_path.read_bytes())
        changed = [key for key in record if previous.get(key) != record[key]]
        if not changed:
            done = sum(part.path(plan_path.parent).is_file() for part in parts)
            console.print(f"resuming: {done} of {len(parts)} parts are done")
            return
        console.print(
            f"{output}: {' and '.join(changed)} changed since the last run; starting over"
        )
    elif (output / manifest_file).is_file():
        console.print(f"{output} holds another or a damaged dataset; starting over")
    (output / manifest_file).unlink(missing_ok=True)
    clear()
    for name in (PARTS_DIRECTORY, TOKENIZER_DIRECTORY):
        shutil.rmtree(output / name, ignore_errors=True)
    plan_path.parent.mkdir()
    write_atomically(plan_path, json.dumps(record, indent=2).encode())


def work_through(
    parts: Sequence[Part],
    work: Callable[[Part], int],
    output: Path,
    num_workers: int,
    console: Console,
) -> None:
    """Make every part that is not there, with progress in bytes on a terminal.

    Raises:
        UserError: a document cannot be read, or a worker died.
    """
    directory = output / PARTS_DIRECTORY
    todo = [part for part in parts if not part.path(directory).is_file()]
    total = sum(part.num_bytes for part in parts)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        "tokenizing", *columns, console=console, disable=not console.is_terminal
    ) as progress:
        done = total - sum(part.num_bytes for part in todo)
        task = progress.add_task("", total=total, completed=done)
        for num_bytes in work_on_parts(todo, work, num_workers):
            progress.advance(task, num_bytes)


def check_unchanged(files: Iterable[SourceFile]) -> None:
    """A file edited while it was read would leave a dataset that nobody can make again.

    Raises:
        UserError: naming the file.
    """
    for file in files:
        status = file.path.stat() if file.path.exists() else None
        if status is None or (status.st_size, status.st_mtime_ns) != (
            file.num_bytes,
            file.modified_ns,
        ):
            raise UserError(f"{file.path} changed while it was being read; run the command again")
