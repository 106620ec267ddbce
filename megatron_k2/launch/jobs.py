"""Jobs of a run after they were submitted: which, how they stand, their log, their end."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_k2.errors import UserError

JOBS = "slurm/jobs.jsonl"
ENDED = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"),
    *("DEADLINE", "REVOKED"),
)
PREEMPTED = "PREEMPTED"
"""Its last state for good, or for the moments until it is back in the queue."""


@dataclass(frozen=True)
class SlurmJob:
    """A job as it was submitted: noted beside the run, one line each."""

    number: str
    submitted: str
    """Local time of the submission, ISO 8601."""


@dataclass(frozen=True)
class State:
    """How Slurm's accounting sees a job."""

    name: str
    """Slurm's word for the state: PENDING, RUNNING, COMPLETED, …"""
    elapsed: str
    """[days-]hours:minutes:seconds of its last start."""

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again."""
        return self.name in ENDED


def note(save: str, number: str) -> None:
    """Write down that ``number`` runs ``save``."""
    path = Path(save) / JOBS
    path.parent.mkdir(parents=True, exist_ok=True)
    job = SlurmJob(number, time.strftime("%Y-%m-%dT%H:%M:%S"))
    with path.open("a") as lines:
        lines.write(json.dumps(asdict(job)) + "\n")


def give_to_sbatch(script: str, save: str, name: str, more: Sequence[str] = ()) -> str:
    """Write a script beside its run, submit it and note the job; returns its number.

    Args:
        script: whole.
        save: the run's directory.
        name: of the script's file.
        more: flags of sbatch.

    Raises:
        UserError: without sbatch, or with its own words where it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on PATH: run this on a login node of a Slurm cluster, or take "
            "--dry-run and submit the script by hand"
        )
    path = Path(save) / "slurm" / name
    path.parent.mkdir(parents=True, exist_ok=True)  # Slurm opens the log before the script runs
    path.write_text(script)
    command = ["sbatch", "--parsable", *more, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    note(save, job)
    return job


def jobs_of(save: str) -> list[SlurmJob]:
    """Every job that was submitted for a run, oldest first.

    Raises:
        UserError: if a line is damaged.
    """
    path = Path(save) / JOBS
    if not path.is_file():
        return []
    try:
        return [SlurmJob(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not what launch wrote ({error}); remove the damaged line, or the file"
        ) from None


def states(jobs: list[SlurmJob]) -> dict[str, State]:
    """Each job's state by its number, from ``sacct``; of a requeued job its last start's.

    Raises:
        UserError: without sacct, or with its own words where it fails, as without accounting.
    """
    if not jobs:
        return {}
    numbers = ",".join(job.number for job in jobs)
    columns = "--format=JobID,State,Elapsed"
    try:
        lines = _ask("sacct", "-X", "--noheader", "--parsable2", columns, f"--jobs={numbers}")
    except UserError as error:
        raise UserError(f"{error}; by hand: squeue --jobs {numbers}, scancel {numbers}") from None
    found = {}
    for line in lines.splitlines():
        number, state, elapsed = line.split("|")
        found[number] = State(state.split()[0], elapsed)  # "CANCELLED by 0"
    return found


def cancel(save: str) -> list[str]:
    """Cancel every job of a run that has not ended; returns their numbers."""
    known = states(jobs_of(save))
    alive = [number for number, state in known.items() if not state.has_ended]
    for number in alive:
        _ask("scancel", number)
    return alive


def log_path(save: str) -> Path:
    """The log of a run's last job.

    Raises:
        UserError: if nothing was submitted.
    """
    jobs = jobs_of(save)
    if not jobs:
        raise UserError(f"{save}: nothing was submitted from here (no {JOBS})")
    return Path(save) / "slurm" / f"{jobs[-1].number}.log"


def follow(save: str, poll_seconds: float = 1.0) -> Iterator[str]:
    """What the run's last log says, as it grows, until its job has ended."""
    path, job = log_path(save), jobs_of(save)[-1]
    position = 0
    while True:
        state = states([job]).get(job.number)
        has_ended = state is not None and (
            state.has_ended or (state.name == PREEMPTED and not _is_queued(job.number))
        )
        if path.is_file():
            with path.open(errors="replace") as log:
                log.seek(position)
                yield log.read()
                position = log.tell()
        if has_ended:
            return
        time.sleep(poll_seconds)


def _is_queued(number: str) -> bool:
    """Whether the controller has the job waiting, running or ending, so that it may run again."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={number}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # it forgets a job that has ended; any other error says nothing
        return "Invalid job id" not in done.stderr
    return bool(set(done.stdout.split()) - {*ENDED, PREEMPTED})


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not on PATH: run this on a node of the Slurm cluster")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
