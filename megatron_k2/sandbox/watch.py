"""From a started process to its result: pipes carried, limits kept, everything ended.

Hard limits are the kernel's, set before the program's first instruction (address space, files,
CPU seconds of one process). Here is what the kernel does not sum: CPU, memory and number of a
program's processes together, bytes written to pipes and to the box's folder.
"""

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass, field

from megatron_k2.sandbox.census import Census, proportional_bytes
from megatron_k2.sandbox.folder import Folder
from megatron_k2.sandbox.pipes import read_some, write_all
from megatron_k2.sandbox.protocol import Limits, Process, Result, Status

FIRST_LOOK_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 0.25
SIGSYS, SIGXCPU, SIGXFSZ = 31, 24, 25
CENSUS = Census()


@dataclass
class _Output:
    """What arrived at both pipes, and whether it was too much."""

    limit: int
    parts: dict[int, list[bytes]] = field(default_factory=dict)
    size: int = 0
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, pipe: int, content: bytes) -> None:
        kept = content[: max(0, self.limit - self.size)]
        self.parts.setdefault(pipe, []).append(kept)
        self.size += len(content)
        if self.size > self.limit:
            self.is_over.set()


async def watch(process: Process, limits: Limits, folder: Folder, stdin: bytes) -> Result:
    """Feed a started process, wait for its end or end it, and say what happened.

    It takes over the process: its descriptors are closed and it is reaped, also when this call is
    cancelled.
    """
    began = time.monotonic()
    loop = asyncio.get_running_loop()
    output = _Output(limits.output_bytes)
    ended = asyncio.Event()
    handle = os.pidfd_open(process.pid)
    loop.add_reader(handle, ended.set)
    pipes = [
        asyncio.ensure_future(_read(process.stdout, output)),
        asyncio.ensure_future(_read(process.stderr, output)),
    ]
    feeding = asyncio.ensure_future(_feed(process.stdin, stdin))
    reason = "", Status.OK
    seen = 0.0
    try:
        reason, seen = await _until_end(process, limits, folder, output, ended, began)
    finally:
        process.kill()
        if not ended.is_set():
            await asyncio.shield(ended.wait())
        loop.remove_reader(handle)
        os.close(handle)
        exit_code, counted = process.reap()
        feeding.cancel()
        # What it wrote before its end lies in the pipes; whoever holds them open is dead by now.
        await asyncio.wait(pipes, timeout=1.0)
        for task in pipes:
            task.cancel()
        await asyncio.gather(feeding, *pipes, return_exceptions=True)
    if not reason[0] and output.is_over.is_set():
        reason = f"wrote more than {limits.output_bytes} bytes", Status.VIOLATION
    cpu_seconds = max(seen, counted or 0.0)
    why, status = reason if reason[0] else _of_exit(exit_code, cpu_seconds, limits)
    return Result(
        status,
        exit_code,
        b"".join(output.parts.get(process.stdout, ())),
        b"".join(output.parts.get(process.stderr, ())),
        round(cpu_seconds, 4),
        round(time.monotonic() - began, 4),
        why,
    )


async def _until_end(
    process: Process,
    limits: Limits,
    folder: Folder,
    output: _Output,
    ended: asyncio.Event,
    began: float,
) -> tuple[tuple[str, Status], float]:
    """The first limit that was reached, if any, and the CPU seconds that were seen."""
    pause, seen = FIRST_LOOK_SECONDS, 0.0
    over, end = (asyncio.ensure_future(event.wait()) for event in (output.is_over, ended))
    try:
        while True:
            await asyncio.wait({over, end}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            if end.done() or over.done():
                return ("", Status.OK), seen
            usage = CENSUS.usage(process.pid)
            seen = max(seen, usage.cpu_seconds)
            found = _over_time(seen, time.monotonic() - began, limits)
            if not found[0]:
                found = _over_size(usage.resident_bytes, usage.pids, folder, limits)
            if found[0]:
                return found, seen
            pause = min(LONGEST_PAUSE_SECONDS, pause * 1.5)
    finally:
        over.cancel()
        end.cancel()


def _over_time(cpu_seconds: float, wall_seconds: float, limits: Limits) -> tuple[str, Status]:
    if cpu_seconds > limits.cpu_seconds:
        return f"more than {limits.cpu_seconds:g} CPU seconds", Status.TIMEOUT
    if wall_seconds > limits.wall_seconds:
        return f"more than {limits.wall_seconds:g} seconds", Status.TIMEOUT
    return "", Status.OK


def _over_size(
    resident_bytes: int, pids: tuple[int, ...], folder: Folder, limits: Limits
) -> tuple[str, Status]:
    # Shared pages counted for each process are a cheap upper bound of what is really taken.
    if resident_bytes > limits.memory_bytes and proportional_bytes(pids) > limits.memory_bytes:
        return f"more than {limits.memory_bytes} bytes of memory", Status.VIOLATION
    # Twice: a back-end's own processes are among them.
    if len(pids) > 2 * limits.num_processes + 4:
        return f"more than {limits.num_processes} processes", Status.VIOLATION
    if folder.num_bytes(limits.disk_bytes) > limits.disk_bytes:
        return f"more than {limits.disk_bytes} bytes on disk", Status.VIOLATION
    return "", Status.OK


def _of_exit(exit_code: int, cpu_seconds: float, limits: Limits) -> tuple[str, Status]:
    """Status of a program that we did not end; the kernel may have, at a limit of ours."""
    if cpu_seconds > limits.cpu_seconds or exit_code == -SIGXCPU:
        return f"more than {limits.cpu_seconds:g} CPU seconds", Status.TIMEOUT
    if exit_code == -SIGSYS:
        return "a system call that is not allowed", Status.VIOLATION
    if exit_code == -SIGXFSZ:
        return f"a file of more than {limits.disk_bytes} bytes", Status.VIOLATION
    if exit_code < 0:
        return f"signal {-exit_code}", Status.KILLED
    return "", Status.OK


async def _read(pipe: int, output: _Output) -> None:
    try:
        while not output.is_over.is_set() and (content := await read_some(pipe)):
            output.take(pipe, content)
    finally:
        os.close(pipe)


async def _feed(pipe: int, content: bytes) -> None:
    try:
        with contextlib.suppress(BrokenPipeError):  # a program need not read its input
            await write_all(pipe, content)
    finally:
        os.close(pipe)
