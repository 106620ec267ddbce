"""One shard's work, in a process of its own: ``python -m megatron_k2.synthesis.work.worker``.

Items are worked on at once up to a bound. A signal, or the end of standard input where it is
watched, stops it gracefully: nothing new is asked, what is under way is answered and kept.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_k2.engine.protocol import EngineError
from megatron_k2.engine.remote.client import RefusedError
from megatron_k2.errors import UserError
from megatron_k2.lock.directory import InUseError, hold
from megatron_k2.synthesis.llm.model import StoppingError
from megatron_k2.synthesis.store import COMMIT_SECONDS, Item, Store
from megatron_k2.synthesis.work.job import (
    FAILED,
    KEPT,
    PROGRESS_FILE,
    REJECTED,
    STORE_FILE,
    Task,
    read_job,
    shard_folder,
)

STOPPED = 130
"""Exit code after a graceful stop."""
WRONG_REQUEST = frozenset({400, 413, 422})
"""Statuses that speak of one request, as of a prompt that is too long; others end the run."""
MOST_FAILURES_IN_A_ROW = 32
"""Items that had no answer, none with one between them, after which the run ends."""
_PROGRESS_SECONDS = 1.0
_STOP_SEEN_SECONDS = 3.0
"""Within which a worker whose starter was killed has told that it is stopping."""


@dataclass
class Tally:
    """How a shard stands."""

    total: int = 0
    kept: int = 0
    rejected: int = 0
    failed: int = 0
    is_stopped: bool = False

    @property
    def done(self) -> int:
        """Items that have ended for good."""
        return self.kept + self.rejected


class _Shard:
    """The loop over one shard's items."""

    def __init__(self, store: Store, task: Task, folder: Path) -> None:
        counts = store.counts()
        self.tally = Tally(counts["items"], counts.get(KEPT, 0), counts.get(REJECTED, 0))
        self._store, self._task, self._folder = store, task, folder
        self._failures_in_a_row = 0

    async def run(self, concurrency: int, stop: asyncio.Event) -> None:
        """Until every item has ended, or the work was stopped."""
        items = self._store.items_left()
        watching = asyncio.create_task(self._watch(stop))
        lanes = [asyncio.create_task(self._lane(items)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*lanes)
        finally:
            for task in (watching, *lanes):
                task.cancel()
            await asyncio.gather(watching, *lanes, return_exceptions=True)
            self._store.commit()
            self.tell()

    async def _lane(self, items: Iterator[Item]) -> None:
        """One item after another; all lanes draw from one iterator."""
        for item in items:
            if self.tally.is_stopped:
                return
            try:
                outcome = await self._task.work(item)
            except StoppingError:
                return
            except (EngineError, RefusedError) as error:
                self._failed(item, error)
                continue
            self._failures_in_a_row = 0
            self._store.end_item(item.hash, KEPT if outcome.is_kept else REJECTED, outcome.record)
            self.tally.kept += outcome.is_kept
            self.tally.rejected += not outcome.is_kept

    def _failed(self, item: Item, error: EngineError | RefusedError) -> None:
        if isinstance(error, RefusedError) and error.status not in WRONG_REQUEST:
            raise UserError(f"the endpoint refuses: {error}") from None
        self.tally.failed += 1
        self._failures_in_a_row += 1
        self._store.end_item(item.hash, FAILED, {"source": item.source, "reason": str(error)})
        if self._failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
            raise UserError(
                f"{self._failures_in_a_row} items in a row had no answer, at last: {error}; "
                "nothing is lost: see to the endpoint and run the same command again"
            )

    async def _watch(self, stop: asyncio.Event) -> None:
        """Commit and tell in time, and hand on that the work is to stop."""
        told_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), COMMIT_SECONDS)
                if not self.tally.is_stopped:
                    self.tally.is_stopped = True
                    self._task.stop()
                await asyncio.sleep(COMMIT_SECONDS)
            self._store.tick()
            if time.monotonic() - told_at > _PROGRESS_SECONDS:
                self.tell()
                told_at = time.monotonic()

    def tell(self) -> None:
        """Write how it stands, for whoever shows progress."""
        text = json.dumps(asdict(self.tally))
        with contextlib.suppress(OSError):  # a full disk, of which the store will tell
            (self._folder / PROGRESS_FILE).write_text(text)


async def work_shard(folder: Path, shard: int, concurrency: int, stop: asyncio.Event) -> Tally:
    """Work on what is left of a shard.

    Raises:
        UserError: the work cannot go on; what was done is kept.
    """
    place = shard_folder(folder, shard)
    task = read_job(folder).made_task()
    with contextlib.closing(Store(place / STORE_FILE)) as store:
        store.forget_ended(FAILED)
        running = _Shard(store, task, place)
        if running.tally.done < running.tally.total:
            try:
                await task.open(store, concurrency)
                await running.run(concurrency, stop)
            finally:
                await task.close()
        else:
            running.tell()
    return running.tally


async def _main(arguments: argparse.Namespace) -> Tally:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        loop.add_signal_handler(number, stop.set)
    if arguments.watch_stdin:
        loop.add_reader(sys.stdin.fileno(), _at_end, stop, loop)
    return await work_shard(arguments.folder, arguments.shard, arguments.concurrency, stop)


def _at_end(stop: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
    """Standard input is a pipe that whoever started this holds and never writes to."""
    stop.set()
    loop.remove_reader(sys.stdin.fileno())


def read_progress(place: Path) -> dict[str, int]:
    """What a shard's worker said last; nothing where it has not, or is just saying it."""
    try:
        found = json.loads((place / PROGRESS_FILE).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def _held(place: Path) -> Iterator[None]:
    """Hold a shard; what a killed run left stopping there is let put its last answers away."""
    patient_until = time.monotonic() + _STOP_SEEN_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(place, "synthesis"))
                break
            except InUseError:
                if time.monotonic() > patient_until and not read_progress(place).get("is_stopped"):
                    raise
            time.sleep(COMMIT_SECONDS)
        yield


def main(argv: list[str] | None = None) -> int:
    """Run it; a wrong input ends with one line and code 2, a graceful stop with 130."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("shard", type=int)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--watch-stdin", action="store_true", help="stop where it ends")
    arguments = parser.parse_args(argv)
    try:
        with _held(shard_folder(arguments.folder, arguments.shard)):
            tally = asyncio.run(_main(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return STOPPED if tally.is_stopped and tally.done < tally.total else 0


if __name__ == "__main__":
    sys.exit(main())
