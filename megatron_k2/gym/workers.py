"""Verifiers in processes that can be ended: what raises, hangs, forks or dies is an *unknown*.

Threads cannot be ended and signals do not reach them, so a verifier with its own alarm fails there
in silence. Each worker has one call in flight; a deadline counts the CPU seconds of that call and
not the wall, so that honest answers survive a busy machine; behind it stands a wall deadline for
calls that sleep. A late worker is killed with all it has started, and another takes its slot.
"""

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.judging import NotJudged
from megatron_k2.gym.worker import HEADER, frame
from megatron_k2.sandbox.census import Census, processes_with
from megatron_k2.sandbox.pipes import read_some, write_all

LOOK_SECONDS = 0.1
END_SECONDS = 5.0
"""For what a worker has started to be gone once it is killed."""
CENSUS = Census()


class VerifierFailed(NotJudged):
    """A call that has no answer; the message says why."""


@dataclass(frozen=True)
class Deadline:
    """Of one call.

    Raises:
        UserError: a time that is not positive.
    """

    cpu_seconds: float = 3.0
    wall_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"{name}={value}: expected a positive number of seconds")


class Workers:
    """A pool of processes that call functions by name.

    Args:
        num_workers: processes; one a core by default.
        deadline: of each call.
        warm_up: calls made by a process before its first, so that imports are not on the first
            call's deadline: ``("module:function", arguments)``.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        deadline: Deadline | None = None,
        warm_up: tuple[tuple[str, dict[str, Any]], ...] = (),
    ) -> None:
        self.num_workers = num_workers or os.cpu_count() or 1
        self.deadline = deadline or Deadline()
        self._warm_up = warm_up
        self._free = asyncio.Semaphore(self.num_workers)
        self._idle: list[_Worker] = []
        self._numbers = itertools.count()

    async def call(self, function: str, **arguments: Any) -> Any:
        """What ``module:function`` returns, as JSON holds it.

        Raises:
            VerifierFailed: it raised, was late, forked, or died.
        """
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._start()
            try:
                value = await self._answer(worker, function, arguments, self.deadline)
            except BaseException as error:
                if isinstance(error, _Raised):
                    self._idle.append(worker)  # it raised and is well
                else:
                    worker.end()
                raise
            if worker.has_children():
                worker.end()
                raise VerifierFailed("it left processes behind")
            self._idle.append(worker)
            return value

    async def _start(self) -> "_Worker":
        worker = _Worker()
        generous = Deadline(cpu_seconds=60, wall_seconds=300)
        for function, arguments in self._warm_up:
            with contextlib.suppress(_Raised):
                await self._answer(worker, function, arguments, generous)
        return worker

    async def _answer(
        self, worker: "_Worker", function: str, arguments: dict[str, Any], deadline: Deadline
    ) -> Any:
        number = next(self._numbers)
        before = CENSUS.usage(worker.pid).cpu_seconds
        end = time.monotonic() + deadline.wall_seconds
        request = frame({"id": number, "call": function, "arguments": arguments})
        reply = asyncio.ensure_future(worker.answer(request))
        try:
            while not (await asyncio.wait({reply}, timeout=LOOK_SECONDS))[0]:
                used = CENSUS.usage(worker.pid).cpu_seconds - before
                if used > deadline.cpu_seconds:
                    raise VerifierFailed(f"more than {deadline.cpu_seconds:g} CPU seconds")
                if time.monotonic() > end:
                    raise VerifierFailed(f"more than {deadline.wall_seconds:g} seconds")
            found = reply.result()
        finally:
            reply.cancel()
            await asyncio.gather(reply, return_exceptions=True)
        if not isinstance(found, dict) or found.get("id") != number:
            raise VerifierFailed("its process ended" if found is None else "an answer of another")
        if "error" in found:
            raise _Raised(str(found["error"]))
        return found["value"]

    async def close(self) -> None:
        """End all that wait for work."""
        while self._idle:
            self._idle.pop().end()


class _Raised(VerifierFailed):
    """The function raised; its process is well."""


class _Worker:
    """One process, and its two pipes.

    Not asyncio's own: that waits for the pipes to close, which a copy of the process may hold open.
    """

    def __init__(self) -> None:
        self._mark = f"worker-{secrets.token_hex(8)}"
        self._child = subprocess.Popen(
            [sys.executable, "-m", "megatron_k2.gym.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "MEGATRON_K2_WORKER": self._mark,
            },
            start_new_session=True,
        )
        self.pid = self._child.pid

    async def answer(self, request: bytes) -> Any:
        """The reply to a frame; ``None`` where the process ended, or wrote what is no frame."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            await write_all(self._child.stdin.fileno(), request)
        found = b""
        while len(found) < HEADER.size or len(found) < HEADER.size + HEADER.unpack_from(found)[0]:
            part = await read_some(self._child.stdout.fileno())
            if not part:
                return None
            found += part
        try:
            return json.loads(found[HEADER.size :])
        except ValueError:
            return None

    def has_children(self) -> bool:
        """Whether it has started processes that are there now."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                if (task / "children").read_text():
                    return True
        return False

    def end(self) -> None:
        """Kill it and everything it has started, wherever that went."""
        self._child.kill()
        until = time.monotonic() + END_SECONDS
        while (left := processes_with(self._mark)) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
