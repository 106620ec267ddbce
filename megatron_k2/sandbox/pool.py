"""Many programs over a few boxes at a time, each in a box and an interpreter of its own.

An interpreter is started ahead of the program it will run, inside its box, and waits for the text.
That takes its start out of a program's wall seconds and changes nothing about what confines it;
nothing of a program is left for the next.
"""

import asyncio
import contextlib
import os
from collections import deque
from types import TracebackType
from typing import Self, cast

from megatron_k2.errors import UserError
from megatron_k2.sandbox.interpreter import as_input, waiting_python
from megatron_k2.sandbox.protocol import Backend, Limits, LocalBox, Process, Result
from megatron_k2.sandbox.watch import watch


class Pool:
    """Runs Python programs, at most ``num_slots`` at a time.

    Args:
        backend: that opens the boxes.
        limits: of each program.
        num_slots: programs at one time; two a core by default.
        num_warm: interpreters that wait, started; 0: each starts with its program.
        python: the interpreter; ``sandbox/interpreter.py`` chooses one by default.

    Raises:
        UserError: no slot, or a negative number of waiting interpreters.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits | None = None,
        *,
        num_slots: int | None = None,
        num_warm: int = 0,
        python: str | None = None,
    ) -> None:
        self.num_slots = 2 * (os.cpu_count() or 1) if num_slots is None else num_slots
        if self.num_slots < 1 or num_warm < 0:
            raise UserError(
                f"num_slots={self.num_slots}, num_warm={num_warm}: expected 1 or more, 0 or more"
            )
        self.backend = backend
        self.limits = limits or Limits()
        self.num_warm = num_warm
        self._command = waiting_python(python if backend.starts_here else python or "python3")
        self._free = asyncio.Semaphore(self.num_slots)
        self._warm: deque[tuple[LocalBox, Process]] = deque()
        self._is_closed = False

    async def run(
        self, program: str, stdin: bytes = b"", files: dict[str, bytes] | None = None
    ) -> Result:
        """Run one program to its end.

        Args:
            program: Python text.
            stdin: what it reads from standard input.
            files: of its folder, by relative path, there before it starts.
        """
        async with self._free:
            if not self.backend.starts_here:
                return await self._run_elsewhere(program, stdin, files or {})
            box, process = self._warm.popleft() if self._warm else self._start()
            self._refill()
            try:
                try:
                    for name, content in (files or {}).items():
                        await box.write(name, content)
                except UserError:
                    await watch(process, self.limits, box.folder, b"")
                    raise
                return await watch(process, self.limits, box.folder, as_input(program, stdin))
            finally:
                await box.close()

    async def _run_elsewhere(self, program: str, stdin: bytes, files: dict[str, bytes]) -> Result:
        async with self.backend.open(self.limits) as box:
            for name, content in files.items():
                await box.write(name, content)
            return await box.run(self._command, stdin=as_input(program, stdin))

    def _start(self) -> tuple[LocalBox, Process]:
        box = cast(LocalBox, self.backend.open(self.limits))
        try:
            return box, box.start(self._command)
        except BaseException:
            box.folder.remove()
            raise

    def _refill(self) -> None:
        while self.backend.starts_here and len(self._warm) < self.num_warm and not self._is_closed:
            self._warm.append(self._start())

    async def __aenter__(self) -> Self:
        self._refill()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_closed = True
        for box, process in self._warm:
            with contextlib.suppress(OSError):
                # Without input an interpreter that waits ends at once.
                await watch(process, self.limits, box.folder, b"")
            await box.close()
        self._warm.clear()
