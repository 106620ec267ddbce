"""The lock of a directory: a small file that says who writes there.

It appears by ``link`` of a finished file, which is atomic and exclusive on NFS too; ``flock`` is
not there, or is each machine's own. Who finds one judges its owner:

- in the same place (boot and process namespace): by the process, which is gone or not;
- elsewhere: by the lock file's time, which ``lock/keeper.py`` renews every ``BEAT_SECONDS``. After
  ``STALE_SECONDS`` without it the owner is dead. Both times are the file server's.
- elsewhere, by an earlier start of the same Slurm job: it was queued again, the lock is its own;
- elsewhere, by the same start of the job: another of its steps, alive or not. Its next sign of life
  is waited for, and who gives none is dead.

A dead owner's lock is replaced by one newcomer alone: the right to is a file named after the dead.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.files import sync_directory, write_atomically
from megatron_k2.lock import keeper

LOCK_FILE = ".megatron-k2.lock"
HANDED_OVER = "MEGATRON_K2_LOCK"
"""Environment variable with the parent's lock, which the first rank makes its own."""
BEAT_SECONDS = 10.0
STALE_SECONDS = 50.0
"""Less than a minute, and time for a few beats to come late."""
_TRIES = 100
_PAUSE_SECONDS = 0.1
_SIGN_SECONDS = 0.5
"""Between two looks for a sign of life."""


class InUseError(UserError):
    """A living process holds the directory."""


@dataclass(frozen=True)
class Owner:
    """Who writes in a directory: the lock file's content."""

    token: str
    """Of one taking; in hexadecimal."""
    what: str
    """What it does there, for a reader."""
    host: str
    pid: int
    started: str
    """The process's start in clock ticks since boot: a process number is used again."""
    place: str
    """Boot and process namespace, within which ``pid`` means something."""
    job: str | None
    """Slurm's number, which stays when a job is queued again."""
    since: str
    """Local time, ISO 8601."""
    restarts: int = 0
    """How often the job was queued again before; Slurm says so from the first time on."""
    schema_version: int = 1


def _start_of(pid: int) -> str | None:
    """When a process of this place started; ``None`` if it is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _this_process(what: str) -> Owner:
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Owner(
        token=secrets.token_hex(16),
        what=what,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        place=_place(),
        job=os.environ.get("SLURM_JOB_ID"),
        since=time.strftime("%Y-%m-%dT%H:%M:%S"),
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )


def _read(path: Path) -> tuple[Owner, float] | None:
    """The owner and when it last gave a sign of life (the server's seconds); ``None`` without."""
    try:
        with path.open("rb") as lock:  # opened, NFS asks the server for the time
            content, modified = lock.read(), os.fstat(lock.fileno()).st_mtime
    except FileNotFoundError:
        return None
    return _parsed(content), modified


def _parsed(content: bytes | str) -> Owner:
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):  # under way where there is no link, or not ours
        return Owner("damaged", "a damaged lock", "unknown", 0, "", "", None, "unknown")


def _is_dead(owner: Owner, silent_seconds: float, me: Owner) -> bool:
    if owner.place == me.place:
        return _start_of(owner.pid) != owner.started
    if _is_of_job(owner, me) and owner.restarts < me.restarts:
        return True
    return silent_seconds > STALE_SECONDS


def _is_of_job(owner: Owner, me: Owner) -> bool:
    return owner.job is not None and owner.job == me.job and owner.place != me.place


def _gives_a_sign(path: Path, own: Path, owner: Owner, modified: float) -> bool:
    """Whether the owner is seen to live before its time is over; waits for it.

    Args:
        path: the lock.
        own: a file beside it, touched to be told the server's time.
        owner: who holds the lock.
        modified: when it gave its last sign of life.
    """
    print(
        f"{path.parent}: held by this very job on host {owner.host}, pid {owner.pid}; waiting for "
        f"a sign of life, {STALE_SECONDS:.0f} s at most",
        file=sys.stderr,
        flush=True,
    )
    while True:
        time.sleep(_SIGN_SECONDS)
        found = _read(path)
        if found is None or found[0].token != owner.token:
            return False
        if found[1] != modified:
            return True
        os.utime(own)
        if own.stat().st_mtime - modified > STALE_SECONDS:
            return False


def _appear(own: Path, name: Path) -> bool:
    """Give the finished file ``own`` a second, exclusive name; False if the name is taken."""
    try:
        os.link(own, name)
    except FileExistsError:
        return own.stat().st_nlink == 2  # NFS says so too where its first answer was lost
    except OSError:  # no links here
        try:
            with name.open("xb") as lock:
                lock.write(own.read_bytes())
        except FileExistsError:
            return False
    return True


def _replace(path: Path, own: Path, dead: Owner, now: float) -> bool:
    """Put ``own`` in the place of the dead owner's lock, unless another has."""
    right = path.with_name(f"{LOCK_FILE}.{dead.token}.ends")
    if not _appear(own, right):
        if (found := _read(right)) and now - found[1] > STALE_SECONDS:
            right.unlink(missing_ok=True)  # died in the few lines below
        return False
    try:
        found = _read(path)
        if found is None or found[0].token != dead.token:
            return False
        os.replace(own, path)
        return True
    finally:
        right.unlink(missing_ok=True)


def _refusal(directory: Path, owner: Owner, silent_seconds: float) -> InUseError:
    return InUseError(
        f"{directory} is in use by another process: {owner.what} on host {owner.host}, pid "
        f"{owner.pid}, since {owner.since} (last sign of life {max(silent_seconds, 0):.0f} s ago); "
        f"wait for it, end it, or take another directory. A dead one's hold ends within "
        f"{STALE_SECONDS:.0f} s"
    )


def _take(path: Path, directory: Path, me: Owner) -> tuple[Owner, Owner | None]:
    """Make ``path`` say ``me``; returns what it says, and the owner that handed it over.

    Raises:
        InUseError: where an owner is alive; names directory, host and process.
    """
    handed_over = os.environ.get(HANDED_OVER)
    parent = None if handed_over is None else _parsed(handed_over)
    own = path.with_name(f"{LOCK_FILE}.{me.token}.new")
    own.write_text(json.dumps(asdict(me)))
    try:
        for _ in range(_TRIES):
            os.utime(own)
            now = own.stat().st_mtime
            if _appear(own, path):
                return me, None
            if (found := _read(path)) is None:
                continue
            owner, modified = found
            if parent is not None and owner.token == parent.token:
                me = replace(me, token=owner.token)
                own.write_text(json.dumps(asdict(me)))
                os.replace(own, path)
                return me, parent
            if not _is_dead(owner, now - modified, me):
                if _is_of_job(owner, me) and not _gives_a_sign(path, own, owner, modified):
                    continue
                raise _refusal(directory, owner, now - modified)
            if _replace(path, own, owner, now):
                return me, None
            time.sleep(_PAUSE_SECONDS)
        raise UserError(f"{path} changes hands all the time; run the command again")
    finally:
        own.unlink(missing_ok=True)


@dataclass
class Hold:
    """A lock that is held."""

    path: Path
    owner: Owner
    before: Owner | None
    """Who handed it over and gets it back."""
    keeper: "subprocess.Popen[bytes]"

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """What is started meanwhile may write in this process's place: it makes the lock its own.

        So does a ``hold`` of the same directory in this process.
        """
        before = os.environ.get(HANDED_OVER)
        os.environ[HANDED_OVER] = json.dumps(asdict(self.owner))
        try:
            yield
        finally:
            os.environ.pop(HANDED_OVER)
            if before is not None:
                os.environ[HANDED_OVER] = before

    def release(self) -> None:
        """End the hold, or give it back; not where a child that made it its own still runs."""
        if os.getpid() != self.owner.pid:
            return  # a fork of the owner
        self.keeper.kill()
        self.keeper.wait()
        found = _read(self.path)
        if found is None or found[0].token != self.owner.token:
            return
        if found[0].pid != self.owner.pid and not _is_dead(found[0], 0.0, self.owner):
            return
        if self.before is None or _is_dead(self.before, 0.0, self.owner):
            self.path.unlink(missing_ok=True)
        else:
            write_atomically(self.path, json.dumps(asdict(self.before)).encode())


@contextlib.contextmanager
def hold(directory: Path, what: str, *, is_beside: bool = False) -> Iterator[Hold]:
    """Be the only one who writes in ``directory``, which is made where it is absent.

    Args:
        directory: on any file system.
        what: what this process does there; others read it when they are refused.
        is_beside: for a directory that appears under its name only when it is whole: the lock lies
            beside it, and it is not made.

    Raises:
        InUseError: another process is at it, named with its host and number.
        UserError: the directory cannot be written.
    """
    path = directory.absolute() / LOCK_FILE
    if is_beside:
        path = directory.absolute().with_name(f"{directory.absolute().name}{LOCK_FILE}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        owner, before = _take(path, directory, _this_process(what))
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    held = Hold(path, owner, before, _start_keeper(path, owner))
    try:
        yield held
    finally:
        held.release()


def _start_keeper(path: Path, owner: Owner) -> "subprocess.Popen[bytes]":
    words: tuple[Any, ...] = (keeper.__file__, path, owner.token, owner.pid, BEAT_SECONDS)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
