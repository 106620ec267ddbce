"""One process of ``pool.PoolEngine``: an embedded engine at the other end of a pipe.

Commands come in lists, those of one turn of the pool's event loop together: ``("generate",
request)``, ``("leave", id)``, ``("call", number, method, arguments)``. What goes back are tuples of
``("output", id, output or error)``, those of one step together, and ``("done", number, result,
error or None)``. No event loop stands between: the core's thread writes into the pipe.
"""

import contextlib
import itertools
import queue
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from megatron_k2.engine.constrained import Grammars
from megatron_k2.engine.local.core import STEP_TOKENS, Core
from megatron_k2.engine.local.core_thread import CoreThread, Deliveries
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import NO_WEIGHTS, EngineError, Request
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class Share:
    """What a worker computes with."""

    preset: ModelPreset
    dtype: torch.dtype
    num_slots: int
    max_length: int
    version: str = NO_WEIGHTS
    expert_groups: tuple[int, int] = (1, 1)
    step_tokens: int = STEP_TOKENS
    is_batch_invariant: bool = False
    grammars: Grammars | None = None

    def weights(self, folder: Path) -> Weights:
        """In the files of a folder."""
        return Weights(self.preset, self.dtype, torch.device("cpu"), self.expert_groups, folder)


def core_over(share: Share, folder: Path) -> Core:
    """A core over weights in files."""
    return Core(
        share.weights(folder),
        num_slots=share.num_slots,
        max_length=share.max_length,
        version=share.version,
        step_tokens=share.step_tokens,
        is_batch_invariant=share.is_batch_invariant,
        grammars=share.grammars,
    )


def main(connection: Connection, share: Share, folder: Path) -> None:
    """Map the weights, say so, work until the pipe closes.

    Raises:
        SystemExit: a step failed, and the engine answers nothing any more: the pool would send it
            every request, having none in flight.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal's and a job's warning go to all;
        signal.signal(number, signal.SIG_IGN)  # the pool ends this one
    torch.set_num_threads(1)
    if fault := _Worker(connection, core_over(share, folder)).obey():
        raise SystemExit(f"a process of the engine ends: {fault}")


class _Worker:
    """Commands to the core's thread, and what comes of them into the pipe."""

    def __init__(self, connection: Connection, core: Core) -> None:
        self._connection, self._core = connection, core
        self._sending = threading.Lock()
        self._commands: queue.SimpleQueue[list[tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread = CoreThread(core, self._deliver)

    def obey(self) -> str:
        """Work until the pipe closes, or the core is of no use; why it is of none."""
        threading.Thread(target=self._read, daemon=True).start()
        self._send(("ready",))
        while (commands := self._commands.get()) is not None:
            for kind, group in itertools.groupby(commands, key=itemgetter(0)):
                match kind:
                    case "generate":
                        self._begin([request for _, request in group])
                    case "leave":
                        for _, name in group:
                            self._thread.leave(name)
                    case "call":
                        for _, number, method, arguments in group:
                            self._call(number, method, arguments)
        fault = self._thread.health().detail
        self._thread.close()
        self._thread.join()
        return fault

    def _begin(self, requests: list[Request]) -> None:
        sound = []
        for request in requests:
            try:
                if request.grammar is not None:  # here, while the core goes on; it is kept for it
                    self._core.compiled(request.grammar)
                sound.append(request)
            except UserError as error:
                self._send(("output", request.id, error))

        def tell(done: Future[None]) -> None:
            if (error := done.exception()) is not None:
                self._send(*(("output", request.id, error) for request in sound))

        self._thread.add(*sound).add_done_callback(tell)

    def _call(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        """A verb of the core's thread, or the CPU seconds that this process has taken."""
        if method == "cpu_seconds":
            self._send(("done", number, time.process_time(), None))
            return

        def tell(done: Future[None]) -> None:
            error = done.exception()
            self._send(("done", number, None, error and EngineError(str(error))))

        getattr(self._thread, method)(*arguments).add_done_callback(tell)

    def _send(self, *messages: tuple[Any, ...]) -> None:
        with self._sending, contextlib.suppress(OSError):  # the pool is gone: the reader sees it
            self._connection.send(messages)

    # What follows runs on the thread that reads, or on the core's.

    def _read(self) -> None:
        try:
            while True:
                self._commands.put(self._connection.recv())
        except (EOFError, OSError):
            self._commands.put(None)

    def _deliver(self, deliveries: Deliveries) -> None:
        self._send(*(("output", name, found) for name, found in deliveries))
        if not self._thread.health().is_ready:
            self._commands.put(None)
