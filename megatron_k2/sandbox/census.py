"""Which processes a program has, and what they have used: one reading of ``/proc`` for all boxes.

A program's processes are the descendants of its first one. What a process that is gone had used is
in its parent's count of children, unless that parent ignored their end; so CPU seconds seen here
are a lower bound, and the wall deadline stands behind them.
"""

import contextlib
import os
import time
from dataclasses import dataclass

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """Of a process and its descendants."""

    cpu_seconds: float = 0.0
    """Theirs, and that of children already waited for."""
    resident_bytes: int = 0
    num_processes: int = 0
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Entry:
    pid: int
    cpu_seconds: float
    resident_bytes: int


class Census:
    """Readings of ``/proc``, shared by everyone who asks within a short time."""

    def __init__(self) -> None:
        self._children: dict[int, list[_Entry]] = {}
        self._entries: dict[int, _Entry] = {}
        self._expires = 0.0

    def usage(self, pid: int) -> Usage:
        """Of ``pid`` and everything below it; zero where it is gone."""
        self._refresh()
        first = self._entries.get(pid)
        found, todo = [], [first] if first else []
        while todo:
            entry = todo.pop()
            found.append(entry)
            todo += self._children.get(entry.pid, ())
        return Usage(
            sum(entry.cpu_seconds for entry in found),
            sum(entry.resident_bytes for entry in found),
            len(found),
            tuple(entry.pid for entry in found),
        )

    def _refresh(self) -> None:
        began = time.monotonic()
        if began < self._expires:
            return
        self._entries, self._children = {}, {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                self._add(int(name))
        ended = time.monotonic()
        # With thousands of processes a reading takes long: at most a tenth of the time goes there.
        self._expires = ended + max(0.02, 10 * (ended - began))

    def _add(self, pid: int) -> None:
        try:
            with open(f"/proc/{pid}/stat", "rb") as stream:
                fields = stream.read().rpartition(b")")[2].split()
        except OSError:
            return
        # proc_pid_stat(5), counted from "state": ppid 1, utime to cstime 11 to 14, rss 21.
        cpu = sum(int(value) for value in fields[11:15]) / TICKS_PER_SECOND
        entry = _Entry(pid, cpu, int(fields[21]) * PAGE_BYTES)
        self._entries[pid] = entry
        self._children.setdefault(int(fields[1]), []).append(entry)


def proportional_bytes(pids: tuple[int, ...]) -> int:
    """Resident memory of processes, what they share counted once."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as stream:
                found = next((line for line in stream if line.startswith(b"Pss:")), b"Pss: 0 kB")
        except OSError:
            continue
        total += int(found.split()[1]) << 10
    return total


def cpu_seconds_at_end(pid: int) -> float:
    """CPU seconds of a process that has ended and was not yet waited for, with its children's."""
    with open(f"/proc/{pid}/stat", "rb") as stream:
        fields = stream.read().rpartition(b")")[2].split()
    return sum(int(value) for value in fields[11:15]) / TICKS_PER_SECOND


def processes_with(mark: str) -> list[int]:
    """Processes but this one that have a mark in the environment they began with.

    Those that are gone and were not waited for have no environment, and are not among them.
    """
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as stream:
            if mark.encode() in stream.read():
                found.append(int(name))
    return found
