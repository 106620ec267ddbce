"""The engine of this machine: a process a shard, as many at one time as there are cores."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_k2.errors import UserError
from megatron_k2.synthesis.work.job import Job, shard_folder
from megatron_k2.synthesis.work.worker import STOPPED, read_progress

LOG_FILE = "worker.log"
"""What a shard's worker said last, below its folder."""
_POLL_SECONDS = 0.05


def worker_command(folder: Path, concurrency: int) -> tuple[list[str], list[str]]:
    """What starts a shard's worker: words after ``python``, and flags after the shard's number."""
    words = ["-m", "megatron_k2.synthesis.work.worker", str(folder)]
    return words, ["--concurrency", str(concurrency)]


def run_local(folder: Path, job: Job, concurrency: int, num_processes: int | None = None) -> bool:
    """Work until every shard has ended; whether all of them ended by themselves.

    Args:
        folder: of the job.
        job: its record.
        concurrency: requests under way at one time, over all processes.
        num_processes: one a core where it is not given.

    Raises:
        UserError: a worker's own sentence, or that one died.
    """
    most = min(num_processes or os.cpu_count() or 1, job.num_shards)
    each = max(concurrency // most, 1)
    waiting, running = list(range(job.num_shards)), dict[int, subprocess.Popen[bytes]]()
    problems: list[str] = []
    is_stopped = False
    with _progress(folder, job) as tell, _stop_asked_for() as stop:
        try:
            while running or (waiting and not problems and not is_stopped):
                while waiting and len(running) < most and not problems and not stop:
                    shard = waiting.pop(0)
                    running[shard] = _started(folder, shard, each)
                for shard, process in list(running.items()):
                    if process.poll() is not None:
                        del running[shard]
                        is_stopped |= process.returncode == STOPPED
                        problems += _problem(folder, shard, process.returncode)
                if stop:
                    is_stopped = True
                    _end(running)
                tell()
                time.sleep(_POLL_SECONDS)
        finally:
            _end(running)
            for process in running.values():
                process.wait()
    if problems:
        raise UserError(problems[0])
    return not is_stopped


def _started(folder: Path, shard: int, concurrency: int) -> "subprocess.Popen[bytes]":
    words, flags = worker_command(folder, concurrency)
    with (shard_folder(folder, shard) / LOG_FILE).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *words, str(shard), *flags, "--watch-stdin"],
            stdin=subprocess.PIPE,  # it ends with this process, however that ends
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which decides
        )


def _end(running: "dict[int, subprocess.Popen[bytes]]") -> None:
    for process in running.values():
        if process.stdin and not process.stdin.closed:
            process.stdin.close()


def _problem(folder: Path, shard: int, code: int) -> list[str]:
    if code in (0, STOPPED):
        return []
    place = shard_folder(folder, shard) / LOG_FILE
    if code == 2:
        return [place.read_text(errors="replace").strip()]
    why = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return [f"shard {shard} was {why}; what was done is kept, run the same command again ({place})"]


@contextlib.contextmanager
def _stop_asked_for() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second one is heeded at once."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(folder: Path, job: Job) -> "Iterator[_Teller]":
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield _Teller(bar, folder, job)


class _Teller:
    """Adds up the shards' progress files, twice a second; nothing where there is no terminal."""

    def __init__(self, bar: Progress, folder: Path, job: Job) -> None:
        self._bar, self._folder, self._job = bar, folder, job
        self._task = bar.add_task("items", total=None, rate="")
        self._began, self._begun, self._told = time.monotonic(), -1, 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if self._bar.disable or now - self._told < 0.5:
            return
        self._told = now
        found = [
            read_progress(shard_folder(self._folder, shard))
            for shard in range(self._job.num_shards)
        ]
        kept, rejected = (sum(each.get(name, 0) for each in found) for name in ("kept", "rejected"))
        done = kept + rejected
        if self._begun < 0:
            self._begun = done
        rate = (done - self._begun) / max(now - self._began, 1e-9)
        share = f"{rate:.1f}/s, kept {kept / max(done, 1):.0%}"
        total = sum(each.get("total", 0) for each in found)
        self._bar.update(self._task, completed=done, total=total, rate=share)
