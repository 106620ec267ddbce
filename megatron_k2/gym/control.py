"""Pauses, deadlines and cancellation of calls that may not heed them."""

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any


class Late(Exception):  # noqa: N818 - what happened
    """A call's time was up."""


class Cancelled(Exception):  # noqa: N818 - what happened
    """Somebody asked for the end; the message says why."""


class Control:
    """Pauses, resumes and cancels the episodes it is handed to.

    A pause lets calls in flight end and begins no other one; its seconds are on no deadline.
    """

    def __init__(self) -> None:
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._is_cancelled = False
        self._waiting: set[asyncio.Future[None]] = set()
        """One of each call that is waited for."""
        self._paused_at = 0.0
        self._paused_seconds = 0.0
        self.reason = ""

    def pause(self) -> None:
        """Begin no further call."""
        if self._goes_on.is_set():
            self._goes_on.clear()
            self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Go on."""
        if not self._goes_on.is_set():
            self._paused_seconds += time.monotonic() - self._paused_at
            self._goes_on.set()

    def cancel(self, reason: str = "cancelled") -> None:
        """End every episode at once, paused ones too; their records say why."""
        self.reason = self.reason or reason
        self._is_cancelled = True
        for each in self._waiting:
            _wake(each)

    def clock(self) -> float:
        """Seconds that were not paused, from some beginning."""
        now = time.monotonic() if self._goes_on.is_set() else self._paused_at
        return now - self._paused_seconds

    async def within[T](self, call: Awaitable[T], until: float, *, what: str) -> T:
        """What a call returns.

        A call that is late is told to end, and not waited for: one that ignores it goes on alone,
        and what it answers then is dropped.

        Raises:
            Late: the clock is at ``until``; the message begins with ``what``.
            Cancelled: somebody asked.
            Exception: whatever the call raises.
        """
        task = asyncio.ensure_future(call)
        try:
            while not task.done():
                left = until - self.clock()
                if self._is_cancelled:
                    raise Cancelled(self.reason)
                if left <= 0:
                    raise Late(f"{what} was late")
                await self._woken_by(task, left)
            if task.cancelled():
                raise RuntimeError(f"{what} cancelled itself")
            return task.result()
        finally:
            task.cancel()
            task.add_done_callback(_drop)  # done it may be too, where the caller is cancelled

    async def _woken_by(self, task: "asyncio.Future[Any]", seconds: float) -> None:
        """Until the task is done, somebody asked for the end, or so long.

        ``asyncio.wait`` with a task for each of these takes four times the CPU, and a run has
        thousands of calls in flight.
        """
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        wake = functools.partial(_wake, woken)
        task.add_done_callback(wake)
        self._waiting.add(woken)
        timer = None if math.isinf(seconds) else loop.call_later(seconds, wake)
        try:
            await woken
        finally:
            self._waiting.discard(woken)
            task.remove_done_callback(wake)
            if timer is not None:
                timer.cancel()

    async def turn(self, until: float) -> None:
        """Wait while paused.

        Raises:
            Late: the clock is at ``until``.
            Cancelled: somebody asked.
        """
        if self._goes_on.is_set() and not self._is_cancelled and self.clock() < until:
            return
        await self.within(self._goes_on.wait(), until, what="the next turn")


def _wake(woken: "asyncio.Future[None]", _done: "asyncio.Future[Any] | None" = None) -> None:
    if not woken.done():
        woken.set_result(None)


def _drop(task: "asyncio.Future[Any]") -> None:
    """Take what a call that was given up raises, so that nothing is said of it later."""
    if not task.cancelled():
        task.exception()


async def contained[T](call: Callable[[], Awaitable[T]]) -> T:
    """What a call gives; an exit that it asks for is its failure, and not the event loop's end."""
    try:
        return await call()
    except SystemExit as asked:
        raise RuntimeError(f"SystemExit: {asked}") from None
