"""Processes that a supervisor starts: each a group of its own, ended with it whatever happens.

A child asks the kernel to be killed when the supervisor's process ends, also by SIGKILL. What it
starts itself is in its group, and is killed with it by whoever ends it in time; after a SIGKILL of
the supervisor it has to notice that its own parent is gone, as this package's engine and vLLM do.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_k2.errors import UserError

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None)
LAST_BYTES = 2000
"""Of a log, in a sentence that says why a process ended."""


class Child:
    """One process.

    Args:
        process: started by ``start``.
        log: that it writes.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process, self._log = process, log
        self.pid = process.pid

    @property
    def is_stopped(self) -> bool:
        """Whether it lies still, by SIGSTOP or a debugger."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return fields[0] in "Tt"

    async def ended(self) -> str:
        """Wait for its end; how it ended, with the last it said."""
        code = await self._process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return f"process {self.pid} ended {how}; {self._log} ends in: {self._last()!r}"

    def _last(self) -> str:
        try:
            with self._log.open("rb") as stream:
                stream.seek(max(0, self._log.stat().st_size - LAST_BYTES))
                lines = stream.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else ""

    async def end(self, seconds: float) -> None:
        """Ask its group to end, and kill what is left of it.

        Args:
            seconds: between the two; 0: it is killed at once.
        """
        if seconds:
            self._send(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), seconds)
        self._send(signal.SIGKILL)
        await self._process.wait()

    def _send(self, number: signal.Signals) -> None:
        # its group outlives it where something that it started is left
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


async def start(words: Sequence[str], environment: Mapping[str, str], log: Path) -> Child:
    """Start a process in a session of its own, standard input closed.

    Args:
        words: program and arguments.
        environment: whole.
        log: that both its outputs are appended to.

    Raises:
        UserError: there is no such program.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that was said
            os._exit(1)

    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with os.fdopen(os.open(log, flags, 0o600), "ab") as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                env=dict(environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as problem:
            raise UserError(f"{words[0]} cannot be started: {problem}") from None
    return Child(process, log)
