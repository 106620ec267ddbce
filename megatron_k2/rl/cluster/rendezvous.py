"""Where the processes of one start of a job meet: a folder on the disk that all of them share.

A process binds a port of the system's choice and writes where it listens into a file of its own,
whole or absent; whoever needs it reads that. The folder's name is the start's *generation*, and a
file that says another was left by somebody else: it is passed over, with a sentence. A process that
was started again writes its file again, with a higher attempt. Several processes that have to be
started again together share a count of attempts, which only rises.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.files import commit_file, sync_directory

TOKEN = "token"
LOOK_SECONDS = 0.2
"""Between two looks of one who waits. Choice: a look is one small read of a shared disk."""
SAY_SECONDS = 30.0
"""Between two sentences of one who waits."""


@dataclass(frozen=True)
class Address:
    """Where a process listens."""

    generation: str
    kind: str
    """``engine``, ``gym``, ``controller``, ``supervisor``, ..."""
    index: int
    host: str
    port: int
    pid: int
    attempt: int
    """How often it was started before."""
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """JSON, of its kind."""

    @property
    def url(self) -> str:
        """Of its HTTP server."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Attempt:
    """One start of what has to be started together."""

    number: int
    why: str
    """The one before it ended; empty of the first."""
    at: float
    """Seconds since 1970."""


class Meeting:
    """The folder.

    Args:
        directory: of one start of a job; made where it is not there. Its name is the generation.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory.resolve()
        self.generation = self.directory.name

    def publish(
        self,
        kind: str,
        index: int,
        host: str,
        port: int,
        *,
        attempt: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Address:
        """Say where this process, or one that it started, listens; replaces what it said before.

        Args:
            kind: of process.
            index: among those of its kind; only one process at a time may have it.
            host: by which others reach it.
            port: that it has bound.
            attempt: None: one more than what lies there.
            details: JSON.
        """
        if attempt is None:
            before = self._read(kind, index)
            attempt = before.attempt + 1 if isinstance(before, Address) else 0
        address = Address(
            self.generation, kind, index, host, port, os.getpid(), attempt, dict(details or {})
        )
        self._write(self._path(kind, index), asdict(address))
        return address

    def read(self, kind: str, index: int) -> Address | None:
        """What a process has said; None: nothing yet.

        Raises:
            UserError: what lies there is of another generation, or not whole.
        """
        found = self._read(kind, index)
        if isinstance(found, str):
            raise UserError(found)
        return found

    async def wait(
        self,
        kind: str,
        index: int,
        seconds: float,
        *,
        attempt: int = 0,
        tell: Callable[[str], None] = lambda _: None,
        given_up: Callable[[], str] = lambda: "",
    ) -> Address:
        """Where a process listens, once it says so.

        Args:
            kind: of process.
            index: among those of its kind.
            seconds: after which it is given up.
            attempt: the lowest that will do.
            tell: is called with what is waited for, now and then.
            given_up: why there is nothing to wait for any longer; empty: there is.

        Raises:
            UserError: it never said so, with what lay there instead, or was given up.
        """
        began = told = time.monotonic()
        while True:
            found = self._read(kind, index)
            if isinstance(found, Address) and found.attempt >= attempt:
                return found
            if why := given_up():
                raise UserError(f"{kind} {index} was given up: {why}")
            now = time.monotonic()
            there = found if isinstance(found, str) else _nothing(found, self._path(kind, index))
            if now - began >= seconds:
                raise UserError(
                    f"{kind} {index} did not say where it listens in {seconds:g} seconds: {there}; "
                    "its own output says why, or it was never started"
                )
            if now - told >= SAY_SECONDS:
                tell(f"waiting for {kind} {index}, {now - began:.0f} s by now: {there}")
                told = now
            await asyncio.sleep(LOOK_SECONDS)

    def token(self) -> str:
        """The secret that every request between the processes carries: made once, by any of them.

        Compare it by ``hmac.compare_digest``.

        Raises:
            UserError: what lies there is no token.
        """
        path = self.token_path
        if not path.exists():
            self._link(path, secrets.token_urlsafe(32).encode())
        found = path.read_text().strip()
        if len(found) < 32:  # ours has 43 letters
            raise UserError(f"{path} is no token; remove it and start the job again")
        return found

    @property
    def token_path(self) -> Path:
        """The file that it stands in."""
        return self.directory / TOKEN

    def attempts(self, name: str) -> list[Attempt]:
        """All starts of what ``name`` stands for, the first one made where there is none."""
        found = self._attempts(name)
        if not found:
            self._add_attempt(name, 0, "")
            found = self._attempts(name)
        return found

    def fail(self, name: str, number: int, why: str) -> None:
        """An attempt has come to nothing: the next one begins, unless somebody has said so before.

        Args:
            name: of those that are started together.
            number: of the attempt that failed.
            why: a sentence.
        """
        self._add_attempt(name, number + 1, why)

    def give_up(self, name: str, why: str) -> None:
        """No attempt of these follows any more."""
        self._link(self._given_up(name), why.encode())

    def given_up(self, name: str) -> str:
        """Why none follows; empty: one may."""
        try:
            return self._given_up(name).read_text()
        except OSError:
            return ""

    def _given_up(self, name: str) -> Path:
        return self.directory / f"{name}.given-up"

    def _attempts(self, name: str) -> list[Attempt]:
        found = []
        for path in self.directory.glob(f"{name}.attempt.*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):  # somebody else's file
                found.append(Attempt(**json.loads(path.read_text())))
        return sorted(found, key=lambda attempt: attempt.number)

    def _add_attempt(self, name: str, number: int, why: str) -> None:
        path = self.directory / f"{name}.attempt.{number}.json"
        self._link(path, json.dumps(asdict(Attempt(number, why, time.time()))).encode())

    def _path(self, kind: str, index: int) -> Path:
        return self.directory / f"{kind}.{index}.json"

    def _read(self, kind: str, index: int) -> Address | str | None:
        """What lies there, or why it will not do."""
        path = self._path(kind, index)
        try:
            row = json.loads(path.read_bytes())
            found = Address(**row)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as problem:
            return f"{path} is not whole ({type(problem).__name__})"
        if found.generation != self.generation:
            return (
                f"{path} is of generation {found.generation!r}, left by another start of the job; "
                f"this one is {self.generation!r}"
            )
        return found

    def _partial(self, path: Path, content: bytes) -> Path:
        """A finished file under a name that nobody reads, for its owner alone."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(partial, flags, 0o600), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        return partial

    def _write(self, path: Path, value: Any) -> None:
        commit_file(self._partial(path, json.dumps(value, indent=1).encode()), path)

    def _link(self, path: Path, content: bytes) -> None:
        """Give ``path`` its content unless it has one: the first of several writers wins."""
        partial = self._partial(path, content)
        try:
            os.link(partial, path)  # fails where it is there, on NFS too
            sync_directory(self.directory)
        except FileExistsError:
            pass
        finally:
            partial.unlink()


def _nothing(found: Address | None, path: Path) -> str:
    if found is None:
        return f"there is no {path}"
    return f"{path} is of attempt {found.attempt}, which has failed"


def own_host(given: str | None = None) -> str:
    """The address to listen on: one interface, never all of them.

    Args:
        given: by a flag; None: the address of this node's name, Slurm's before the machine's.

    Raises:
        UserError: the name has no address.
    """
    if given is not None:
        if given in ("0.0.0.0", "::", ""):  # refused, not bound
            raise UserError(f"--host {given}: give the address of one interface")
        return given
    names = [os.environ.get("SLURMD_NODENAME"), socket.gethostname()]
    for name in filter(None, names):
        with contextlib.suppress(OSError):
            return socket.gethostbyname(name)
    raise UserError(f"{socket.gethostname()} has no address; give --host")


def free_port(host: str) -> int:
    """A port of the system's choice, free a moment ago."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as bound:
        bound.bind((host, 0))
        return int(bound.getsockname()[1])
