"""Episodes that a service plays for callers elsewhere: each call made once, each episode closed.

An episode's id is its caller's. A step whose ordinal has come before is answered with what it gave
then, so that a request whose answer was lost may be sent again; what an environment was told once
is not told twice. Episodes are closed by name, or once nothing has come for a while.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from megatron_k2.gym.episode import Again
from megatron_k2.gym.protocol import Domain, Environment, Step, task_from
from megatron_k2.records.read import message_from
from megatron_k2.rl.cluster.gym_wire import step_object, verdict_object

IDLE_SECONDS = 7200.0
"""Choice: longer than a turn takes to be drawn, weights that are sent meanwhile included."""


class Refused(Exception):  # noqa: N818  # an answer
    """A request that cannot be answered as it stands."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Episode:
    """One environment, its last call, and what that gave.

    Args:
        environment: of this episode alone.
        called: seconds of the clock, when something came last.
    """

    def __init__(self, environment: Environment, called: float) -> None:
        self.environment, self.called = environment, called
        self._ordinal = -1
        self._last: asyncio.Task[Step] | None = None

    async def step(self, ordinal: int, call: Callable[[], Awaitable[Step]]) -> Step:
        """The answer to a call, made once however often it is asked for.

        Args:
            ordinal: 0 for ``reset``.
            call: of the environment.

        Raises:
            Refused: it is neither the last one again nor the next, or that is still under way.
        """
        is_under_way = self._last is not None and not self._last.done()
        if ordinal == self._ordinal + 1 and not is_under_way:
            self._ordinal, self._last = ordinal, asyncio.ensure_future(_task(call))
        elif ordinal != self._ordinal:
            state = "is under way" if is_under_way else "was the last"
            raise Refused(409, f"step {ordinal}, and {self._ordinal} {state}")
        last = self._last
        assert last is not None
        try:
            return await asyncio.shield(last)  # whoever asked may go; it is told again
        except Again:
            if self._last is last:  # nothing has happened
                self._ordinal, self._last = ordinal - 1, None
            raise

    async def close(self) -> None:
        """End what it does, and what it has where it says how."""
        if self._last is not None:
            self._last.cancel()
            await asyncio.gather(self._last, return_exceptions=True)
        for name in ("close", "end"):  # no part of the protocol; those of ``gym/adapters`` do
            if callable(end := getattr(self.environment, name, None)):
                with contextlib.suppress(Exception):
                    await end()
                return


async def _task(call: Callable[[], Awaitable[Step]]) -> Step:
    return await call()


class Episodes:
    """All that are open.

    Args:
        domains: by name, open.
        idle_seconds: after which one is closed.
        clock: seconds.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._domains, self._idle, self._clock = domains, idle_seconds, clock
        self._open: dict[str, Episode] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def reset(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Begin an episode, or say again how it began."""
        task = _read(task_from, body, "task")
        if name not in self._open:
            environment = self._domain(task.domain).environment()
            self._open[name] = Episode(environment, self._clock())
        episode = self._of(name)
        return step_object(await episode.step(0, lambda: episode.environment.reset(task)))

    async def step(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One action."""
        episode, action = self._of(name), _read(message_from, body, "action")
        ordinal = body.get("ordinal")
        if not isinstance(ordinal, int) or ordinal < 1:
            raise Refused(400, f"ordinal {ordinal!r}: expected a number from 1")
        return step_object(await episode.step(ordinal, lambda: episode.environment.step(action)))

    async def verify(self, name: str, _body: Mapping[str, Any]) -> dict[str, Any]:
        """Judge an episode as it stands."""
        return verdict_object(await self._of(name).environment.verify())

    async def judge(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Verify a single answer."""
        task = _read(task_from, body, "task")
        if not isinstance(answer := body.get("answer"), str):
            raise Refused(400, "answer: expected text")
        return verdict_object(await self._domain(task.domain).judge(task, answer))

    async def close(self, names: Sequence[str]) -> int:
        """End these; how many of them there were."""
        found = [each for name in names if (each := self._open.pop(name, None)) is not None]
        await asyncio.gather(*(each.close() for each in found))
        return len(found)

    async def sweep(self) -> int:
        """End those for which nothing has come for long; how many there were."""
        now = self._clock()
        idle = [name for name, each in self._open.items() if now - each.called > self._idle]
        return await self.close(idle)

    async def close_all(self) -> None:
        """End everything, the domains too."""
        await self.close(list(self._open))
        for domain in self._domains.values():
            await domain.close()

    def _of(self, name: str) -> Episode:
        if (found := self._open.get(name)) is None:
            raise Refused(
                404,
                f"no episode {name[:80]!r}: it was closed, had been idle for {self._idle:g} "
                "seconds, or the service was started again",
            )
        found.called = self._clock()
        return found

    def _domain(self, name: str) -> Domain:
        if (found := self._domains.get(name)) is None:
            known = ", ".join(sorted(self._domains))
            raise Refused(400, f"domain {name[:80]!r} is not open here; {known} are")
        return found


def _read(read: Callable[[dict[str, Any]], Any], body: Mapping[str, Any], name: str) -> Any:
    try:
        return read(body[name])
    except (KeyError, ValueError, TypeError, AttributeError) as problem:
        raise Refused(400, f"{name}: {problem}"[:500]) from None
