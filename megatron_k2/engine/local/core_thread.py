"""The core on a thread of its own: commands between steps, outputs handed on after each.

Nothing is ever changed under a step. ``engine.py`` stands over it for an event loop, ``worker.py``
for a pipe.
"""

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.protocol import (
    NO_WEIGHTS,
    EngineError,
    Health,
    Output,
    PauseMode,
    Request,
    UpdateCode,
    UpdateError,
)
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError

UNGIVEN = "this engine has no weights yet: it was started without, and waits for an update"
type Deliveries = list[tuple[str, Output | EngineError]]
"""Of one step: ids of requests, and what they got; an error is the last that comes."""


class CoreThread:
    """See the module. What is asked for comes as a future, done on the thread.

    Args:
        core: with weights, or of version ``NO_WEIGHTS``; the thread's from here on.
        deliver: called on the thread.
    """

    def __init__(self, core: Core, deliver: Callable[[Deliveries], None]) -> None:
        self.core, self._deliver = core, deliver
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._open: set[str] = set()
        """Requests that still get something."""
        self._is_paused = self._is_closed = False
        self._fault = UNGIVEN if core.version == NO_WEIGHTS else ""
        self._idle: list[Future[None]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, *requests: Request) -> Future[None]:
        """Begin answers, all of them before the next step."""

        def begin() -> None:
            self.require_ready()
            for request in requests:
                self.core.add(request)
                self._open.add(request.id)

        return self._send(begin)

    def leave(self, name: str) -> Future[None]:
        """End a request that nobody waits for."""

        def end() -> None:
            self._open.discard(name)
            self.core.abort([name])

        return self._send(end)

    def abort(self, ids: Iterable[str] | None) -> Future[None]:
        """End requests, their last output among what is delivered."""
        wanted = None if ids is None else list(ids)
        return self._send(lambda: self._hand_on(self.core.abort(wanted)))

    def pause(self, mode: PauseMode) -> Future[None]:
        """Done when nothing runs; ``wait`` finishes what is in a slot, what waits stays waiting.

        Raises:
            UserError: there is no such mode.
        """
        if mode not in ("abort", "wait", "keep"):
            raise UserError(f"pause mode {mode!r}: abort, wait or keep")
        done: Future[None] = Future()

        def stop() -> None:
            if mode == "abort":
                self._hand_on(self.core.abort(None))
            if mode == "wait" and self.core.scheduler.going:
                self.core.scheduler.is_open = False
                self._idle.append(done)
                return
            self._is_paused = True
            if done.set_running_or_notify_cancel():
                done.set_result(None)

        self._send(stop)
        return done

    def resume(self) -> Future[None]:
        """Go on."""

        def go_on() -> None:
            self._is_paused, self.core.scheduler.is_open = False, True

        return self._send(go_on)

    def update(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: str,
        manifest: Callable[[], Manifest] | None,
    ) -> Future[None]:
        """Replace every weight; ``weights`` is drawn on the thread, between two steps."""

        def replace() -> None:
            self._fault = f"weights {version!r} are half in"
            try:
                self.core.update(weights, version, manifest)
            except Exception as error:
                self._fail(f"the update to weights {version!r} failed: {error}")
                raise UpdateError(code_of(error), self._fault) from error
            self._fault = ""

        return self._send(replace)

    def adopt(self, version: str) -> Future[None]:
        """Go on with weights that another process has replaced in their files."""

        def take() -> None:
            self.core.adopt(version)
            self._fault = ""

        return self._send(take)

    def health(self) -> Health:
        """Now, without waiting."""
        scheduler = self.core.scheduler
        return Health(
            not self._fault and not self._is_closed,
            self._fault or ("closed" if self._is_closed else ""),
            self._is_paused,
            self.core.version,
            len(scheduler.going),
            len(scheduler.waiting),
        )

    def close(self) -> Future[None] | None:
        """End everything; None where that has happened."""

        def end() -> None:
            self._is_closed = True
            self._end_all(EngineError("the engine was closed"))

        return None if self._is_closed else self._send(end)

    def join(self) -> None:
        """Wait for the thread of a closed core."""
        self._thread.join()

    def require_ready(self) -> None:
        """Refuse to begin what would not be answered.

        Raises:
            EngineError: with the reason.
        """
        if self._is_closed or self._fault:
            raise EngineError(self._fault or "the engine is closed")

    def _send(self, command: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        self._commands.put((command, done))
        return done

    # What follows runs on the thread.

    def _run(self) -> None:
        while not self._is_closed:
            self._obey()
            if self._is_working:
                self._step()
            self._settle_pause()

    @property
    def _is_working(self) -> bool:
        is_held = self._is_paused or self._is_closed or self._fault
        return self.core.has_work and not is_held

    def _step(self) -> None:
        try:
            self._hand_on(self.core.step())
        except Exception as error:  # takes every request with it, not the thread
            self._fail(f"a step failed: {error}")

    def _fail(self, fault: str) -> None:
        self._fault = fault
        self._end_all(EngineError(fault))

    def _end_all(self, error: EngineError) -> None:
        self.core.abort(None)
        ended, self._open = self._open, set()
        self._deliver([(name, error) for name in ended])

    def _hand_on(self, outputs: list[tuple[str, Output]]) -> None:
        found: Deliveries = [(name, o) for name, o in outputs if name in self._open]
        self._open.difference_update(name for name, output in outputs if output.finish_reason)
        if found:
            self._deliver(found)

    def _settle_pause(self) -> None:
        """Those that wait for the slots to empty."""
        if self._idle and not self.core.scheduler.going:
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


def code_of(error: Exception) -> UpdateCode:
    """Whose fault a failed update was."""
    match error:
        case UpdateError():
            return error.code
        case UserError():
            return UpdateCode.WEIGHTS
    return UpdateCode.SOURCE
