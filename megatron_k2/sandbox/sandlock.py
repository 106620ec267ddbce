"""Programs under Landlock and seccomp, by sandlock: no root, no namespaces, one kernel with us.

Landlock decides about files, the network, signals and abstract sockets; a filter and a supervisor
in this process decide about system calls. What it leaves to the caller is done here: root is
dropped (a program with root's capabilities could raise its limits again), and the box's folder is
watched instead of sandlock's copy-on-write folder, which loses files (its issues 80 and 112).
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import signal
from typing import Any

from megatron_k2.sandbox.box import FolderBox, kernel_limits, without_root
from megatron_k2.sandbox.census import cpu_seconds_at_end
from megatron_k2.sandbox.folder import Folder
from megatron_k2.sandbox.interpreter import readable_roots
from megatron_k2.sandbox.protocol import Limits

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
OLDEST_KERNEL = (6, 7)


class Sandlock:
    """The library sandlock (Apache-2.0)."""

    name = "sandlock"
    starts_here = True

    def missing(self) -> str | None:
        """Not installed, or a kernel without the Landlock it needs."""
        if importlib.util.find_spec("sandlock") is None:
            return "not installed: pip install 'megatron-k2[sandbox]'"
        release = platform.release()
        numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
        if numbers < OLDEST_KERNEL:
            return f"Linux {release}: sandlock needs 6.7 or later"
        import sandlock

        found, needed = sandlock.landlock_abi_version(), sandlock.min_landlock_abi()
        if found < needed:
            return f"this kernel's Landlock is version {found}; sandlock needs {needed}"
        return None

    def version(self) -> str:
        """Of the package."""
        return importlib.metadata.version("sandlock")

    def open(self, limits: Limits) -> FolderBox:
        """A box whose folder programs see where it is."""
        return FolderBox(_start, limits, None)


def _start(
    command: list[str], variables: dict[str, str], folder: Folder, limits: Limits
) -> "_Confined":
    from sandlock import Sandbox, StdioMode

    sandbox = Sandbox(
        fs_readable=[*readable_roots(), *DEVICES],
        fs_writable=[str(folder.path), "/dev/null"],
        max_memory=limits.memory_bytes,
        max_processes=limits.num_processes,
        max_open_files=limits.num_files,
        no_coredump=True,
        clean_env=True,
        env={**variables, "TMPDIR": str(folder.path)},
        cwd=str(folder.path),
    )
    piped = StdioMode.PIPED
    before = [*without_root(), *kernel_limits(limits)]
    return _Confined(sandbox.popen([*before, *command], stdin=piped, stdout=piped, stderr=piped))


class _Confined:
    """sandlock's process, its descriptors taken over."""

    def __init__(self, process: Any) -> None:
        self.pid: int = process.pid
        self._process = process
        self.stdin, self.stdout, self.stderr = (
            os.dup(pipe.fileno()) for pipe in (process.stdin, process.stdout, process.stderr)
        )
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()

    def kill(self) -> None:
        """SIGKILL to its group; sandlock ends those that left it."""
        self._process.kill()

    def reap(self) -> tuple[int, float | None]:
        """Exit code, and CPU seconds where the process can still be asked."""
        seconds = None
        with contextlib.suppress(OSError):
            seconds = cpu_seconds_at_end(self.pid)
        found = self._process.wait()
        if found.exit_code >= 0:
            return found.exit_code, seconds
        return -(found.signal if found.signal > 0 else signal.SIGKILL), seconds
