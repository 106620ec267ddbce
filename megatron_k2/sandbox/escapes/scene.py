"""What stands outside for a program to reach: canary files, listeners, a victim, a mark.

A program is told where these are by ``HO_*`` variables. That a sandbox held is read off the scene,
not off what the program says of itself. A user's own ``HO_*`` variables, which name files, take the
place of ours and are watched as well.
"""

import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_k2.sandbox.census import processes_with
from megatron_k2.sandbox.protocol import Result

CANARY_VARIABLE = "MEGATRON_K2_CANARY"
"""In the environment of whoever starts programs, and nowhere inside."""
PREFIX = "HO_"
LEAST_BYTES = 8
"""A canary file shorter than this may appear in an output by chance."""
GRACE_SECONDS = 2.0
"""In which a process that was killed with its program must be gone, on a machine that is busy."""
IPC_CREAT, IPC_RMID = 0o1000, 0


class Scene:
    """A scene for one program; a context manager."""

    def __init__(self, given: Mapping[str, str] = os.environ) -> None:
        self._stack = ExitStack()
        self._folder = Path(tempfile.mkdtemp(prefix="megatron_k2-scene-"))
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self.mark = f"mark-{secrets.token_hex(8)}"
        self._secret = f"sesame-{secrets.token_hex(8)}"
        os.environ[CANARY_VARIABLE] = "of the caller alone"
        (self._folder / "secret").write_text(self._secret)
        self._victim = subprocess.Popen(["sleep", "600"])
        self._stack.callback(self._end_victim)
        self._memory_key = self._shared_memory()
        self._listeners: dict[str, socket.socket] = {}
        ports = self._listen()
        theirs = {name: value for name, value in given.items() if name.startswith(PREFIX)}
        ours = {
            "HO_SECRET": str(self._folder / "secret"),
            "HO_FOLDER": str(self._folder),
            "HO_VICTIM": str(self._victim.pid),
            "HO_SHM": str(self._memory_key),
            "HO_MARK": self.mark,
            **ports,
        }
        self.environment: dict[str, str] = {**ours, **theirs}
        """What the program is told."""
        watched = [value for name, value in theirs.items() if Path(value).is_absolute()]
        self._canaries = [self._folder / "secret", *map(Path, watched)]
        self._before = {path: _state(path) for path in self._canaries}
        self._secrets = {self._secret.encode(), *filter(None, map(_content, self._canaries))}

    def _shared_memory(self) -> int:
        key, libc = secrets.randbelow(1 << 30) + 1, ctypes.CDLL(None, use_errno=True)
        identity = libc.shmget(key, 4096, IPC_CREAT | 0o666)
        if identity >= 0:
            self._stack.callback(libc.shmctl, identity, IPC_RMID, None)
        return key

    def _listen(self) -> dict[str, str]:
        path, name = str(self._folder / "socket"), f"k2-{secrets.token_hex(6)}"
        unix, inet = socket.AF_UNIX, socket.AF_INET
        stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
        self._add("HO_PORT", inet, stream, ("127.0.0.1", 0))
        self._add("HO_UDP", inet, datagram, ("127.0.0.1", 0))
        self._add("HO_SOCKET", unix, stream, path)
        self._add("HO_SOCKET.datagram", unix, datagram, path + ".datagram")
        self._add("HO_ABSTRACT", unix, stream, "\0" + name)
        self._add("HO_ABSTRACT.datagram", unix, datagram, "\0" + name + ".datagram")
        for each in ("socket", "socket.datagram"):
            (self._folder / each).chmod(0o777)
        self._folder.chmod(0o777)
        return {
            "HO_PORT": str(self._listeners["HO_PORT"].getsockname()[1]),
            "HO_UDP": str(self._listeners["HO_UDP"].getsockname()[1]),
            "HO_SOCKET": path,
            "HO_ABSTRACT": name,
            "HO_FREE_PORT": str(self._call_from_outside()),
        }

    def _add(self, name: str, family: int, kind: int, address: str | tuple[str, int]) -> None:
        listener = self._stack.enter_context(socket.socket(family, kind))
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen(8)
        listener.setblocking(False)
        self._listeners[name] = listener

    def _call_from_outside(self) -> int:
        """A free port that we call again and again: a program that listens there is reached."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        is_over = threading.Event()

        def call() -> None:
            while not is_over.wait(0.2):
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 0.2).close()

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(is_over.set)
        return port

    def _end_victim(self) -> None:
        self._victim.kill()
        self._victim.wait()

    def escape_of(self, result: Result) -> str:
        """What of the scene the program reached; ``""`` if nothing."""
        output = result.stdout + result.stderr
        if any(secret in output for secret in self._secrets):
            return "a canary file was read"
        changed = [path for path in self._canaries if _state(path) != self._before[path]]
        strange = {path.name for path in self._folder.iterdir()} - {
            *("secret", "socket", "socket.datagram")
        }
        if changed or strange:
            return f"outside was written: {', '.join([*map(str, changed), *sorted(strange)])}"
        if self._victim.poll() is not None or _is_stopped(self._victim.pid):
            return "a process outside was ended or stopped"
        reached = [name for name, listener in self._listeners.items() if _was_called(listener)]
        if reached:
            return f"reached {', '.join(reached)}"
        survivors = _survivors(self.mark)
        for pid in survivors:
            with suppress(OSError):
                os.kill(pid, 9)
        return f"{len(survivors)} processes outlived it" if survivors else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def _survivors(mark: str) -> list[int]:
    """Processes of a program that is over; one that was killed is gone once the kernel runs it."""
    end = time.monotonic() + GRACE_SECONDS
    while (found := processes_with(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _content(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    content = path.read_bytes().strip()
    return content if len(content) >= LEAST_BYTES else None


def _is_stopped(pid: int) -> bool:
    return b"\nState:\tT" in Path(f"/proc/{pid}/status").read_bytes()


def _was_called(listener: socket.socket) -> bool:
    try:
        if listener.type == socket.SOCK_DGRAM:
            listener.recv(64)
        else:
            listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True
