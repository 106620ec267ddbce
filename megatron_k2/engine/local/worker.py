"""One process of ``pool.PoolEngine``: an embedded engine at the other end of a pipe.

Commands come as tuples: ``("generate", request)``, ``("leave", id)``, ``("call", number, method,
arguments)``. What goes back is gathered and sent once a turn of the event loop, as a list of
``("output", id, output)``, ``("failed", id, error)`` and ``("done", number, error or None)``.
"""

import asyncio
import signal
import threading
import time
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_k2.engine.constrained import Grammars
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import EngineError, Request
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class Share:
    """What a worker computes with."""

    preset: ModelPreset
    dtype: torch.dtype
    expert_groups: tuple[int, int]
    folder: Path
    """Of the weights' files."""
    num_slots: int
    max_length: int
    version: str
    step_tokens: int
    is_batch_invariant: bool
    grammars: Grammars | None


class _Outbox:
    """Messages of one turn of the event loop, sent together."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._messages = connection, list[tuple[Any, ...]]()
        self._loop = asyncio.get_running_loop()

    def put(self, *message: Any) -> None:
        """Send it before long."""
        if not self._messages:
            self._loop.call_soon(self._flush)
        self._messages.append(message)

    def _flush(self) -> None:
        messages, self._messages = self._messages, []
        self._connection.send(messages)


def main(connection: Connection, share: Share) -> None:
    """Map the weights, say so, work until the pipe closes.

    Raises:
        SystemExit: a step failed, and the engine answers nothing any more: the pool would send it
            every request, having none in flight.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; the pool ends this one
    torch.set_num_threads(1)
    weights = Weights(
        share.preset, share.dtype, torch.device("cpu"), share.expert_groups, share.folder
    )
    core = Core(
        weights,
        num_slots=share.num_slots,
        max_length=share.max_length,
        version=share.version,
        step_tokens=share.step_tokens,
        is_batch_invariant=share.is_batch_invariant,
        grammars=share.grammars,
    )
    connection.send([("ready",)])
    if fault := asyncio.run(_serve(connection, LocalEngine(core))):
        raise SystemExit(f"a process of the engine ends: {fault}")


async def _serve(connection: Connection, engine: LocalEngine) -> str:
    """Obey until the pipe closes, or the engine is of no use; why it is of none."""
    loop, outbox = asyncio.get_running_loop(), _Outbox(connection)
    commands: asyncio.Queue[tuple[Any, ...] | None] = asyncio.Queue()

    def read() -> None:
        try:
            while True:
                loop.call_soon_threadsafe(commands.put_nowait, connection.recv())
        except (EOFError, OSError):
            loop.call_soon_threadsafe(commands.put_nowait, None)

    def ended(_: asyncio.Task[None]) -> None:
        if not engine.health().is_ready:
            commands.put_nowait(None)

    threading.Thread(target=read, daemon=True).start()
    answers: dict[str, asyncio.Task[None]] = {}
    calls: set[asyncio.Task[None]] = set()
    while (command := await commands.get()) is not None:
        match command:
            case ("generate", request):
                task = asyncio.create_task(_generate(engine, request, outbox))
                answers[request.id] = task
                task.add_done_callback(partial(_forget, answers, request.id))
                task.add_done_callback(ended)
            case ("leave", name):
                if name in answers:
                    answers.pop(name).cancel()
            case ("call", number, method, arguments):
                call = asyncio.create_task(_call(engine, number, method, arguments, outbox))
                calls.add(call)
                call.add_done_callback(calls.discard)
    fault = engine.health().detail
    await engine.close()
    return fault


def _forget(answers: dict[str, asyncio.Task[None]], name: str, task: asyncio.Task[None]) -> None:
    if answers.get(name) is task:  # else the name is another's by now
        del answers[name]


async def _generate(engine: LocalEngine, request: Request, outbox: _Outbox) -> None:
    try:
        if request.grammar is not None:  # the engine's own thread then finds it compiled
            await asyncio.to_thread(engine.check_grammar, request.grammar)
        async with aclosing(engine.generate(request)) as outputs:
            async for output in outputs:
                outbox.put("output", request.id, output)
    except (UserError, EngineError) as error:
        outbox.put("failed", request.id, error)


async def _call(
    engine: LocalEngine, number: int, method: str, arguments: tuple[Any, ...], outbox: _Outbox
) -> None:
    """A verb of the engine, or the CPU seconds that this process has taken."""
    try:
        if method == "cpu_seconds":
            found: Any = time.process_time()
        else:
            found = await getattr(engine, method)(*arguments)
        outbox.put("done", number, found, None)
    except Exception as error:
        outbox.put("done", number, None, EngineError(str(error)))
