"""What everything above sees of a sandbox: boxes with a folder, programs run in them.

A back-end opens boxes. A box owns a folder that its programs find as their working directory; it is
empty at first and gone afterwards. Programs have no network, see nothing of this process, and end
at the first limit they reach. Time is counted in CPU seconds: on a machine that others use, a
deadline in wall seconds condemns honest programs. The wall deadline is there for those that sleep.
"""

from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from megatron_k2.errors import UserError
from megatron_k2.sandbox.folder import Folder

MEBIBYTE = 1 << 20


class Status(StrEnum):
    """How a program ended."""

    OK = "ok"
    """By itself, with whatever exit code."""
    TIMEOUT = "timeout"
    """At its deadline in CPU or wall seconds."""
    KILLED = "killed"
    """By a signal that no limit of ours explains: its own, or the kernel's."""
    VIOLATION = "violation"
    """At a limit other than time, or by the system-call filter."""


@dataclass(frozen=True)
class Limits:
    """What one program may take.

    Raises:
        UserError: a value that is not positive.
    """

    cpu_seconds: float = 5.0
    """Of all its processes together."""
    wall_seconds: float = 60.0
    memory_bytes: int = 512 * MEBIBYTE
    """Address space of a process, and resident memory of all together."""
    num_processes: int = 32
    """At one time, threads counted where the kernel counts them."""
    num_files: int = 128
    """Open in a process at one time."""
    output_bytes: int = MEBIBYTE
    """Of standard output and standard error together."""
    disk_bytes: int = 64 * MEBIBYTE
    """Of the box's folder, of its ``/tmp``, and of any one file."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"sandbox limit {name}={value}: expected a positive number")


@dataclass(frozen=True)
class Result:
    """What became of one program."""

    status: Status
    exit_code: int
    """As the program gave it; -n where signal n ended it."""
    stdout: bytes
    stderr: bytes
    """Each up to the limit of both together."""
    cpu_seconds: float
    """Of all its processes, as the kernel counted them; what starting it cost is in it."""
    wall_seconds: float
    reason: str = ""
    """Of a status other than ok: which limit, which signal."""

    @property
    def is_success(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.status is Status.OK and self.exit_code == 0

    @property
    def last_line(self) -> str:
        """The last line of standard output that is not blank, without what surrounds it."""
        lines = self.stdout.decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Process(Protocol):
    """A program that runs in a box, as a back-end started it."""

    pid: int
    """Every other process of it descends from this one."""
    stdin: int
    stdout: int
    stderr: int
    """File descriptors, ours to close."""

    def kill(self) -> None:
        """End every process of it, at once."""

    def reap(self) -> tuple[int, float | None]:
        """After its end: exit code (-n for signal n), CPU seconds where the kernel said them."""


class Box(Protocol):
    """One folder and what runs in it."""

    limits: Limits

    async def run(
        self, command: list[str], *, stdin: bytes = b"", environment: dict[str, str] | None = None
    ) -> Result:
        """Run a command in the box's folder, to its end."""

    async def write(self, name: str, content: bytes) -> None:
        """Put a file into the folder; folders on its way are made.

        Raises:
            UserError: a name that leaves the folder, or leads through a symbolic link.
        """

    async def read(self, name: str) -> bytes:
        """A file of the folder, at most ``limits.disk_bytes`` of it.

        Raises:
            UserError: no such regular file inside the folder.
        """

    async def close(self) -> None:
        """End what runs, remove the folder."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class LocalBox(Box, Protocol):
    """A box of this machine: a program can be started ahead, and watched."""

    folder: Folder

    def start(self, command: list[str], environment: dict[str, str] | None = None) -> Process:
        """Start a command; ``sandbox/watch.py`` takes it over, and gives it its input."""


class Backend(Protocol):
    """One way to confine programs."""

    name: str
    starts_here: bool
    """Whether its boxes are ``LocalBox``."""

    def missing(self) -> str | None:
        """Why it cannot run on this machine and what would change that; ``None`` where it can."""

    def version(self) -> str:
        """Of what confines: a verdict of the escape suite is kept for one version."""

    def open(self, limits: Limits) -> Box:
        """A new box."""
