"""``LocalEngine``: the core on a thread of its own, behind the engine's protocol.

The thread takes commands between steps, so that nothing is ever changed under a step. Outputs go to
the event loop that asked, one call a step.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.protocol import (
    EngineError,
    Health,
    Limits,
    Output,
    PauseMode,
    Request,
    UpdateCode,
    UpdateError,
    check_request,
)
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError


class _Stream(asyncio.Queue[Output | Exception]):
    """Where one request's outputs go, on its event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()


class LocalEngine:
    """The embedded engine.

    Args:
        core: with weights loaded; the engine's from here on.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._streams: dict[str, _Stream] = {}
        self._is_paused = self._is_closed = False
        self._fault = ""
        self._idle: list[Future[None]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> Limits:
        """See the protocol."""
        return self._core.limits

    def check_grammar(self, grammar: str) -> None:
        """See the protocol."""
        self._core.compiled(grammar)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See the protocol."""
        check_request(request, self.limits)
        if request.id in self._streams:
            raise UserError(f"request id {request.id!r} is in flight already")
        self._require_ready()
        stream = self._streams[request.id] = _Stream()
        is_ended = False
        try:
            await self._do(lambda: self._add(request))
            while not is_ended:
                output = await stream.get()
                if isinstance(output, Exception):
                    is_ended = True
                    raise output
                is_ended = output.finish_reason is not None
                yield output
        finally:
            self._streams.pop(request.id, None)
            if not is_ended and not self._is_closed:
                self._send(lambda: self._core.abort([request.id]))

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """See the protocol."""
        wanted = None if ids is None else list(ids)
        await self._do(lambda: self._deliver(self._core.abort(wanted)))

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See the protocol; ``wait`` finishes what is in a slot, what waits stays waiting."""
        if mode not in ("abort", "wait", "keep"):
            raise UserError(f"pause mode {mode!r}: abort, wait or keep")
        done: Future[None] = Future()

        def stop() -> None:
            if mode == "abort":
                self._deliver(self._core.abort(None))
            if mode == "wait" and self._core.scheduler.going:
                self._core.scheduler.is_open = False
                self._idle.append(done)
                return
            self._is_paused = True
            done.set_result(None)

        await self._do(stop)
        await asyncio.wrap_future(done)

    async def resume(self) -> None:
        """See the protocol."""
        await self._do(self._go_on)

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: str,
        manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        """See the protocol; ``weights`` is drawn on the engine's thread, between two steps."""

        def update() -> None:
            self._fault = f"weights {version!r} are half in"
            try:
                self._core.update(weights, version, manifest)
            except Exception as error:
                self._fault = f"the update to weights {version!r} failed: {error}"
                self._core.abort(None)
                self._fail(EngineError(self._fault))
                raise UpdateError(code_of(error), self._fault) from error
            self._fault = ""

        await self._do(update)

    async def adopt(self, version: str) -> None:
        """Go on with weights that another process has replaced in their files."""
        await self._do(lambda: self._core.adopt(version))

    def health(self) -> Health:
        """See the protocol."""
        scheduler = self._core.scheduler
        return Health(
            not self._fault and not self._is_closed,
            self._fault or ("closed" if self._is_closed else ""),
            self._is_paused,
            self._core.version,
            len(scheduler.going),
            len(scheduler.waiting),
        )

    async def close(self) -> None:
        """See the protocol."""
        if not self._is_closed:
            await self._do(self._end)
        self._thread.join()

    def _require_ready(self) -> None:
        if self._is_closed or self._fault:
            raise EngineError(self._fault or "the engine is closed")

    def _send(self, command: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        self._commands.put((command, done))
        return done

    async def _do(self, command: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._send(command))

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        while not self._is_closed:
            self._obey()
            if self._is_working:
                self._step()
            self._settle_pause()

    @property
    def _is_working(self) -> bool:
        is_held = self._is_paused or self._is_closed or self._fault
        return self._core.has_work and not is_held

    def _step(self) -> None:
        try:
            self._deliver(self._core.step())
        except Exception as error:  # takes every request with it, not the thread
            self._fault = f"a step failed: {error}"
            self._core.abort(None)
            self._fail(EngineError(self._fault))

    def _settle_pause(self) -> None:
        """Those that wait for the slots to empty."""
        if self._idle and not self._core.scheduler.going:
            self._is_paused = True
            for done in self._idle:
                if done.set_running_or_notify_cancel():  # else nobody waits any longer
                    done.set_result(None)
            self._idle.clear()

    def _obey(self) -> None:
        """Commands that have come; waits for one where there is nothing to do."""
        is_busy = self._is_working
        while True:
            try:
                command, done = self._commands.get(block=not is_busy)
            except queue.Empty:
                return
            is_busy = True
            if not done.set_running_or_notify_cancel():
                continue  # whoever asked has gone
            try:
                done.set_result(command())
            except Exception as error:
                done.set_exception(error)

    def _add(self, request: Request) -> None:
        self._require_ready()
        self._core.add(request)

    def _go_on(self) -> None:
        self._is_paused, self._core.scheduler.is_open = False, True

    def _end(self) -> None:
        self._is_closed = True
        self._core.abort(None)
        self._fail(EngineError("the engine was closed"))

    def _deliver(self, outputs: list[tuple[str, Output]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Output]]] = {}
        for name, output in outputs:
            if (stream := self._streams.get(name)) is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, pairs in by_loop.items():
            loop.call_soon_threadsafe(_put_all, pairs)

    def _fail(self, error: EngineError) -> None:
        for stream in list(self._streams.values()):
            stream.loop.call_soon_threadsafe(stream.put_nowait, error)


def code_of(error: Exception) -> UpdateCode:
    """Whose fault a failed update was."""
    match error:
        case UpdateError():
            return error.code
        case UserError():
            return UpdateCode.WEIGHTS
    return UpdateCode.SOURCE


def _put_all(pairs: list[tuple[_Stream, Output]]) -> None:
    for stream, output in pairs:
        stream.put_nowait(output)
