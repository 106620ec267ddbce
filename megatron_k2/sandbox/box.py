"""What every back-end's box shares: the folder, one program after another, an orderly end."""

import asyncio
import os
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

from megatron_k2.sandbox.folder import NOBODY, Folder, drops_root
from megatron_k2.sandbox.protocol import Limits, Process, Result
from megatron_k2.sandbox.watch import watch

type Starter = Callable[[list[str], dict[str, str], Folder, Limits], Process]

BASE_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
"""All that a program finds in its environment, and ``HOME``; nothing of ours is passed on."""


class Closing(ABC):
    """Closed where its ``with`` ends, also where the task that holds it is cancelled."""

    @abstractmethod
    async def close(self) -> None:
        """End it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.shield(self.close())


class FolderBox(Closing):
    """A box over a folder of this machine; the back-end says how a process is started."""

    def __init__(self, starter: Starter, limits: Limits, home: str | None) -> None:
        self.limits = limits
        self.folder = Folder()
        self._starter = starter
        self._home = home or str(self.folder.path)

    def start(self, command: list[str], environment: dict[str, str] | None = None) -> Process:
        """Start a command; whoever calls must hand the process to ``sandbox/watch.py``."""
        variables = {**BASE_ENVIRONMENT, "HOME": self._home, **(environment or {})}
        return self._starter(command, variables, self.folder, self.limits)

    async def run(
        self, command: list[str], *, stdin: bytes = b"", environment: dict[str, str] | None = None
    ) -> Result:
        """Run a command in the folder, to its end."""
        return await watch(self.start(command, environment), self.limits, self.folder, stdin)

    async def write(self, name: str, content: bytes) -> None:
        """Put a file into the folder."""
        self.folder.write(name, content)

    async def read(self, name: str) -> bytes:
        """A file of the folder."""
        return self.folder.read(name, self.limits.disk_bytes)

    async def close(self) -> None:
        """Remove the folder."""
        self.folder.remove()


class ChildProcess:
    """A process that ``subprocess`` started; killing its first process must end all of it."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.pid = child.pid
        self._child = child
        # The watch closes descriptors; Python's objects must not close them a second time.
        self.stdin, self.stdout, self.stderr = (
            _detached(pipe.fileno()) for pipe in (child.stdin, child.stdout, child.stderr) if pipe
        )
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe:
                pipe.close()

    def kill(self) -> None:
        """SIGKILL to the first process. Not ``Popen.kill``: that reaps one that has ended."""
        if self._child.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> tuple[int, float | None]:
        """Exit code, and the CPU seconds of everything that was waited for below."""
        _, status, usage = os.wait4(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._child.returncode = code
        return code, usage.ru_utime + usage.ru_stime


def _detached(descriptor: int) -> int:
    copy = os.dup(descriptor)
    os.set_inheritable(copy, False)
    return copy


def kernel_limits(limits: Limits, *, num_processes: int | None = None) -> list[str]:
    """The kernel's limits, as the start of a command line.

    The CPU limit stands behind the one that is watched, in case this process is held up.

    Args:
        limits: of the box.
        num_processes: as the kernel counts them for a user of a namespace; ``None`` where the
            program shares a namespace with others, whom it would count too.
    """
    values = {
        "as": limits.memory_bytes,
        "nofile": limits.num_files,
        "fsize": limits.disk_bytes,
        "cpu": int(limits.cpu_seconds) + 2,
        "nproc": num_processes,
        "core": 0,
        "memlock": 0,
        "msgqueue": 0,
    }
    return ["prlimit", *(f"--{n}={value}" for n, value in values.items() if value is not None)]


def without_root() -> list[str]:
    """The start of a command line that becomes nobody where this process is root."""
    if not drops_root():
        return []
    ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
