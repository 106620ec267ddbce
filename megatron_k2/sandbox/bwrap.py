"""Programs in namespaces of their own, by bubblewrap: no network, no other process, few files.

Hardened beyond its defaults. ``bwrap --clearenv`` leaves the caller's environment readable in
``/proc/1/environ``: it is started with none. ``--disable-userns`` and the system-call filter close
what namespaces do not confine. Against root the kernel does not hold a limit of processes: where
this process is root, everything from bwrap on runs as nobody.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path

from megatron_k2.sandbox.box import ChildProcess, FolderBox, without_root
from megatron_k2.sandbox.folder import Folder
from megatron_k2.sandbox.interpreter import readable_roots
from megatron_k2.sandbox.protocol import Limits
from megatron_k2.sandbox.syscall_filter import syscall_filter

HOME = "/work"
OLDEST = (0, 8)
"""The first version with ``--disable-userns``."""
NAMESPACES = [
    *("--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-net", "--unshare-ipc"),
    *("--unshare-uts", "--unshare-cgroup-try", "--uid", "65534", "--gid", "65534"),
    *("--cap-drop", "ALL", "--new-session", "--die-with-parent", "--as-pid-1"),
]
RUN = '"$@"; exit $?'
"""The namespace's first process. bwrap's own is not waited for, and takes with it what the kernel
counted of its children's CPU seconds; a shell is, and so is everything that dies with it."""


class Bwrap:
    """bubblewrap, a small program that distributions ship (LGPL)."""

    name = "bwrap"
    starts_here = True

    def missing(self) -> str | None:
        """Not installed, too old, or without user namespaces."""
        absent = [name for name in ("bwrap", "setpriv") if not shutil.which(name)]
        if absent:
            return f"{', '.join(absent)} not found: apt-get install bubblewrap util-linux"
        if self._numbers() < OLDEST:
            return f"bwrap {self.version()} lacks --disable-userns: 0.8 or later is needed"
        tried = subprocess.run(
            [*_confined({}, Limits()), "/usr/bin/true"],
            env={},
            capture_output=True,
            text=True,
            check=False,
        )
        if tried.returncode:
            said = tried.stderr.strip()
            return f"bwrap does not start ({said}): user namespaces must be allowed for users"
        return None

    def version(self) -> str:
        """As bwrap says it."""
        said = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False)
        return said.stdout.split()[-1] if said.stdout else "0"

    def _numbers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version().split(".")[:2] if part.isdigit())

    def open(self, limits: Limits) -> FolderBox:
        """A box whose folder programs see as ``/work``."""
        return FolderBox(self._start, limits, HOME)

    def _start(
        self, command: list[str], variables: dict[str, str], folder: Folder, limits: Limits
    ) -> ChildProcess:
        reading, writing = os.pipe()
        try:
            os.write(writing, _FILTER())  # a few KB: a pipe holds it
            os.close(writing)
            mine = ["--bind", str(folder.path), HOME, "--chdir", HOME, "--seccomp", str(reading)]
            child = subprocess.Popen(
                [*_confined(variables, limits), *mine, "--", *_init(limits), *command],
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[reading],
                start_new_session=True,
            )
        finally:
            os.close(reading)
        return _Namespaces(child)


class _Namespaces(ChildProcess):
    """bwrap, and as its child the first process of the namespace."""

    def kill(self) -> None:
        """End the namespace's first process, and so all in it; bwrap ends after them.

        bwrap's own end would reach them too, but a little later than we see it.
        """
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
                return
        super().kill()

    def reap(self) -> tuple[int, float | None]:
        """As of a child; a shell says signal n as exit code 128 + n."""
        code, seconds = super().reap()
        return (128 - code if code > 128 else code), seconds


_FILTER = functools.cache(syscall_filter)


def _confined(variables: dict[str, str], limits: Limits) -> list[str]:
    """The command line up to what is one box's alone."""
    files = [word for root in _real_roots() for word in ("--ro-bind", root, root)]
    links = [word for path, to in _linked_roots() for word in ("--symlink", to, path)]
    places = ["--proc", "/proc", "--dev", "/dev", "--size", str(limits.disk_bytes)]
    # /dev is a tmpfs without a size: left writable, it would be a way to take memory.
    places += ["--tmpfs", "/tmp", "--remount-ro", "/dev"]
    given = [word for name in variables for word in ("--setenv", name, variables[name])]
    return [*without_root(), "bwrap", *NAMESPACES, *files, *links, *places, *given]


def _init(limits: Limits) -> list[str]:
    """The first process: a shell that sets the kernel's limits and waits for the program.

    It and bwrap's own are among the processes that the kernel counts for a user of a namespace.
    """
    processes = limits.num_processes + 2
    values = {
        "c": 0,
        "l": 0,
        "v": limits.memory_bytes >> 10,
        "f": limits.disk_bytes >> 9,
        "n": limits.num_files,
        "t": int(limits.cpu_seconds) + 2,
    }
    each = [f"ulimit -{letter} {value}" for letter, value in values.items()]
    # dash's letter for processes, then bash's, to which -p is the size of a pipe.
    each.append(f"{{ ulimit -p {processes} 2>/dev/null || ulimit -u {processes}; }}")
    script = " && ".join([*each, RUN])
    return ["/bin/sh", "-c", script, "sh"]


def _real_roots() -> list[str]:
    return [root for root in readable_roots() if not os.path.islink(root)]


def _linked_roots() -> list[tuple[str, str]]:
    return [(root, os.readlink(root)) for root in readable_roots() if os.path.islink(root)]
