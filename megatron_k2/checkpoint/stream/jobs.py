"""A conversion as jobs: one output file each, done once, by any number of processes.

Crash safety: a job's file is written under a temporary name, flushed and renamed, then its receipt
(what the file holds) is written. A job whose receipt and file are there is done, so a conversion
killed at any moment and started again redoes only what was under way. Receipts and names are not
flushed one by one, which costs more than small files do: a power cut may lose or tear the last
ones, and what they stood for is done again. The conversion's fingerprint (inputs and options) lies
beside the receipts: of another conversion's leftovers nothing is taken. The result keeps it
(``FINISHED``), so that a command killed after its result was whole, and started again, is done.

Workers are forked, so none imports anything anew, and end with their parent. Forking is safe here:
until then the parent has read headers and compared names, and no thread pool of torch has started;
a worker computes in its one thread.
"""

import contextlib
import ctypes
import errno
import gc
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.stream.output_file import OutputFile
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json, sync_directory, write_atomically

logger = logging.getLogger(__name__)

Receipt = dict[str, Any]
"""JSON-able; ``num_bytes`` is the length of the job's file."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), after every job."""

FINISHED = ".conversion"
"""File of a whole result: the fingerprint of the conversion that made it."""

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Job:
    """One output file of a conversion, and what it takes to write it."""

    file: str
    num_bytes: int
    """About how many it takes; for progress and for the order of work."""
    payload: Any
    """What the work function needs to know; must be picklable."""


Work = Callable[[OutputFile, Job], Receipt]
"""Writes the job to the file given (under a temporary name) and says what it wrote."""


class FinishedError(UserError):
    """The target is the whole result of the very conversion that is asked for."""


class JobDirectory:
    """The directory a conversion writes in before its result gets its final name."""

    def __init__(self, target: Path, conversion: dict[str, Any], num_bytes: int = 0) -> None:
        """Prepare ``target``'s neighbour ``<target>.partial``.

        Args:
            target: final directory; must be absent or empty.
            conversion: inputs and options, JSON-able; leftovers of another one are removed.
            num_bytes: that the result takes.

        Raises:
            FinishedError: if it was made before.
            UserError: if something else is there, or the disk has not that much room.
        """
        self.target = target
        self.directory = target.with_name(f"{target.name}.partial")
        self._receipts = _receipts_of(self.directory)
        self.fingerprint = sha256_of_json(conversion)
        if _fingerprint_in(target) == self.fingerprint:
            shutil.rmtree(self._receipts, ignore_errors=True)  # killed before they were dropped
            raise FinishedError(f"{target} exists already, whole: this very conversion made it")
        require_free(target)
        require_space(target, num_bytes)
        record = self._receipts / "job"
        is_ours = record.is_file() and record.read_text() == self.fingerprint
        if not (is_ours and self.directory.exists()):
            for leftover in (self.directory, self._receipts):
                if leftover.exists():
                    logger.warning("removing %s, left by another conversion", leftover)
                    shutil.rmtree(leftover)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._receipts.mkdir(exist_ok=True)
        write_atomically(record, self.fingerprint.encode())

    def receipt(self, job: Job) -> Receipt | None:
        """The receipt of a finished job; None if the job is yet to be done."""
        path = _receipt_path(self.directory, job)
        written = self.directory / job.file
        if not path.is_file() or not written.is_file():
            return None
        try:
            receipt: Receipt = json.loads(path.read_text())
        except ValueError:
            return None  # torn by a power cut
        return receipt if written.stat().st_size == receipt["num_bytes"] else None

    def publish(self) -> None:
        """Give the directory its final name, then drop the receipts."""
        write_atomically(self.directory / FINISHED, self.fingerprint.encode())
        for folder, _, files in os.walk(self.directory):
            for name in files:
                if name.endswith((".tmp", ".partial")):  # of a run that was killed
                    (Path(folder) / name).unlink()
            sync_directory(Path(folder))
        self.directory.rename(self.target)  # an empty target is replaced, as POSIX says
        sync_directory(self.target.parent)
        shutil.rmtree(self._receipts)


def _receipts_of(directory: Path) -> Path:
    """Beside it, not in it: they last until it has its final name, by one rename."""
    return directory.with_name(f"{directory.name}.receipts")


def _receipt_path(directory: Path, job: Job) -> Path:
    return _receipts_of(directory) / f"{Path(job.file).name}.json"


def _fingerprint_in(target: Path) -> str | None:
    """Of the conversion whose whole result ``target`` is; ``None`` for anything else."""
    record = target / FINISHED
    return record.read_text(errors="replace") if record.is_file() else None


def require_free_or_finished(target: Path) -> None:
    """Refuse at once what no conversion left; ``JobDirectory`` knows whether it was this one."""
    if _fingerprint_in(target) is None:
        require_free(target)


def require_free(target: Path) -> None:
    """Refuse to write into a directory that has something in it."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; remove it or choose another directory")


def require_space(target: Path, num_bytes: int) -> None:
    """Refuse what cannot fit, before anything is written.

    Args:
        target: what will be written; need not exist.
        num_bytes: it will take.
    """
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{target}: {parent} is not a directory that can be written to")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(
            f"{target} needs {num_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; "
            "choose another disk"
        )


def require_workers(num_workers: int) -> None:
    """Refuse a number of workers below one."""
    if num_workers < 1:
        raise UserError(f"--workers {num_workers}: expected 1 or more")


def run_jobs(
    job_directory: JobDirectory,
    jobs: Sequence[Job],
    work: Work,
    num_workers: int,
    progress: Progress,
) -> list[Receipt]:
    """Do what is not done yet; receipts in the order of ``jobs``."""
    receipts = {job.file: receipt for job in jobs if (receipt := job_directory.receipt(job))}
    total = sum(job.num_bytes for job in jobs)
    done = sum(job.num_bytes for job in jobs if job.file in receipts)
    if receipts:
        logger.warning("%d of %d files are there already", len(receipts), len(jobs))
    progress(done, total)
    for job, receipt in _results(
        job_directory.directory,
        [job for job in jobs if job.file not in receipts],
        work,
        num_workers,
    ):
        receipts[job.file] = receipt
        done += job.num_bytes
        progress(done, total)
    return [receipts[job.file] for job in jobs]


def _results(
    directory: Path, jobs: Sequence[Job], work: Work, num_workers: int
) -> Iterator[tuple[Job, Receipt]]:
    if num_workers == 1 or len(jobs) < 2:
        yield from _here(directory, jobs, work)
        return
    context = multiprocessing.get_context("fork")
    gc.freeze()  # else each worker's first collection copies what the parent has imported
    try:
        num = min(num_workers, len(jobs))
        with ProcessPoolExecutor(num, context, _start_worker, (os.getpid(),)) as pool:
            largest_first = sorted(jobs, key=lambda job: -job.num_bytes)
            running = {pool.submit(do_job, directory, job, work): job for job in largest_first}
            try:
                for future in as_completed(running):
                    yield running[future], future.result()
            except BrokenProcessPool:
                raise UserError(
                    f"{directory}: a worker was killed, for its memory or because a file that it "
                    "read has become shorter; run the same command again, finished files are kept"
                ) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        gc.unfreeze()


def _here(directory: Path, jobs: Sequence[Job], work: Work) -> Iterator[tuple[Job, Receipt]]:
    """In this process; a job's file is written while the one before goes to the disk."""
    with ThreadPoolExecutor(1) as flusher:
        before: tuple[Job, Future[Receipt]] | None = None
        for job in jobs:
            written = write_job(directory, job, work)
            if before is not None:
                yield before[0], before[1].result()
            before = job, flusher.submit(finish_job, directory, job, *written)
        if before is not None:
            yield before[0], before[1].result()


def _start_worker(parent: int) -> None:
    """End with the parent, at once: what outlives it writes beside its successor."""
    if (torch := sys.modules.get("torch")) is not None:  # FP8 without a compiler
        torch.set_num_threads(1)  # the processes are the parallelism

    if (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
        prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)

    def watch() -> None:  # elsewhere than on Linux, and for a parent that has just ended
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def do_job(directory: Path, job: Job, work: Work) -> Receipt:
    """One job, written and finished."""
    return finish_job(directory, job, *write_job(directory, job, work))


def write_job(directory: Path, job: Job, work: Work) -> tuple[OutputFile, Receipt]:
    """Everything but the disk's part: a file under a temporary name, open, and what it holds.

    Raises:
        UserError: naming the file, if the disk is full or fails.
    """
    final = directory / job.file
    temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    for leftover in final.parent.glob(f"{final.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    with naming_the_file(final):
        file = OutputFile(temporary, job.num_bytes)
        try:
            receipt = work(file, job)
            file.flush()
        except BaseException:
            with contextlib.suppress(OSError):  # of what could not be written, once more
                file.close()
            temporary.unlink(missing_ok=True)
            raise
    return file, receipt


def finish_job(directory: Path, job: Job, file: OutputFile, receipt: Receipt) -> Receipt:
    """Flush, rename, receipt: after this the job is done, however the conversion ends.

    Raises:
        UserError: naming the file, if the disk is full or fails.
    """
    final = directory / job.file
    with naming_the_file(final):
        with file:
            file.sync()
            receipt["num_bytes"] = os.fstat(file.fileno()).st_size
        Path(file.name).replace(final)
        path = _receipt_path(directory, job)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(receipt, separators=(",", ":")))
        unfinished.replace(path)
    return receipt


@contextlib.contextmanager
def naming_the_file(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Turn what a disk reports into a sentence that names the file, and the tensor written."""
    try:
        yield
    except OSError as error:
        at = f" at {tensor!r}" if tensor else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full{at}; make room and run the same command again, finished "
                "files are kept"
            ) from error
        if error.errno == errno.EIO:
            raise UserError(
                f"{path}: the disk fails{at} ({error.strerror}); look at it, or choose another"
            ) from error
        if error.errno == errno.EFAULT:  # of a page that is no longer in the file read from
            raise UserError(
                f"{path}: a file that was read{at} has become shorter meanwhile; let the download "
                "or copy end, then run the same command again, finished files are kept"
            ) from error
        raise
