"""One engine of a fleet, in one attempt: where it is, what it was last seen to be."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from megatron_k2.engine.protocol import EngineError, Limits, Output, Request
from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.dialects import Dialect, dialect_of
from megatron_k2.engine.remote.endpoints import Endpoint, Policy, State
from megatron_k2.engine.remote.engine import RemoteEngine
from megatron_k2.engine.remote.rounds import Round
from megatron_k2.rl.cluster.probe import Probe
from megatron_k2.rl.cluster.rendezvous import Address

_NO_REST = 1 << 30
_POLICY = Policy(
    concurrency=4096,
    attempts=1,
    attempt_seconds=86_400.0,
    deadline_seconds=86_400.0,
    failures_to_rest=_NO_REST,
)
"""The fleet itself asks again, elsewhere, and gives up who is silent: an answer may take hours."""


class Replica:
    """See the module.

    Args:
        address: that its supervisor published.
        key_file: with the key.
        limits: of every engine of the fleet.
    """

    def __init__(self, address: Address, key_file: Path, limits: Limits) -> None:
        self.address = address
        self.client = Client([endpoint_of(address, key_file)], _POLICY)
        self.engine = RemoteEngine(self.client, limits)
        self.gone = asyncio.Event()
        """Requests that it has are given up."""
        self.num_running = self.num_answered = 0
        self.seen = Probe(False, False, None, "not looked at yet")
        self.heard = time.monotonic()
        self.is_paused = False
        self._is_emptied = False
        """Its weights were thrown away or are half in, whatever its server says."""

    @property
    def state(self) -> State:
        """Of its one endpoint, for verbs."""
        return self.client.endpoints.states[0]

    @property
    def dialect(self) -> Dialect:
        """What it speaks."""
        return dialect_of([self.state])

    def round_of(self, version: str) -> Round:
        """Its part in a round of weights of this version."""
        return self.dialect.round_of(self.client, self.state, version)

    @property
    def is_up(self) -> bool:
        """Whether it answered when it was last looked at."""
        return self.seen.is_alive and not self.gone.is_set()

    def holds(self, version: str | None) -> bool:
        """Whether it may be asked for answers of these weights."""
        return (
            self.is_up
            and self.seen.is_ready
            and not self._is_emptied
            and version is not None
            and self.seen.version == version
        )

    def note(self, seen: Probe, silent_seconds: float) -> None:
        """Take what a look has seen.

        Args:
            seen: by the look.
            silent_seconds: after which its requests are given up.
        """
        now = time.monotonic()
        self.seen = seen
        if seen.is_alive:
            self.heard = now
            if self.gone.is_set():  # it was stopped, and goes on
                self.gone = asyncio.Event()
        elif now - self.heard > silent_seconds:
            self.gone.set()

    def empty(self) -> None:
        """Its weights are none, or a mixture, from here on."""
        self._is_emptied = True

    def fill(self, version: str) -> None:
        """They are whole, and of this version."""
        self._is_emptied = False
        self.seen = Probe(True, True, version, "")

    async def post(self, path: str, body: Any = None) -> None:
        """A verb.

        Raises:
            EngineError: it is not obeyed.
        """
        await unless_gone(self.client.once(self.state, "POST", path, body), self)

    async def answer(self, request: Request) -> Output:
        """The whole answer.

        Raises:
            EngineError: it fails, or was given up meanwhile.
        """

        async def whole() -> Output:
            async with contextlib.aclosing(self.engine.generate(request)) as outputs:
                return await anext(outputs)

        self.num_running += 1
        try:
            found = await unless_gone(whole(), self)
        finally:
            self.num_running -= 1
        self.num_answered += 1
        return found

    async def close(self) -> None:
        """End its requests and connections."""
        self.gone.set()
        await self.engine.close()

    def __str__(self) -> str:
        attempt = f"{self.address.url}, attempt {self.address.attempt}"
        if not self.is_up:
            return f"{attempt}: {self.seen.detail or 'silent'}"
        if self._is_emptied or not self.seen.is_ready:
            return f"{attempt}: without whole weights ({self.seen.detail or 'to be given'})"
        return f"{attempt}: weights {self.seen.version!r}"


def endpoint_of(address: Address, key_file: Path) -> Endpoint:
    """An engine as its supervisor published it.

    Args:
        address: what it said.
        key_file: with the key.
    """
    weights = address.details.get("weights")
    return Endpoint(
        address.url,
        key_file=key_file,
        weights_dir=None if weights is None else Path(weights),
        api="sglang" if address.details.get("backend") == "sglang" else "openai",
    )


async def unless_gone[T](work: Awaitable[T], replica: Replica) -> T:
    """What comes of it.

    Raises:
        EngineError: the engine was given up meanwhile.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(replica.gone.wait())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() or task.cancelled():
            raise EngineError(f"{replica} was given up")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
