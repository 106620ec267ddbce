"""``LocalEngine``: the core on a thread of its own, behind the engine's protocol.

Outputs go to the event loop that asked, one call a step.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from torch import Tensor

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.core_thread import CoreThread, Deliveries
from megatron_k2.engine.protocol import Health, Limits, Output, PauseMode, Request, check_request
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
        core: see ``CoreThread``; the engine's from here on.
    """

    def __init__(self, core: Core) -> None:
        self.limits: Limits = core.limits
        self._streams: dict[str, _Stream] = {}
        self._core = core
        self._thread = CoreThread(core, self._deliver)

    def check_grammar(self, grammar: str) -> None:
        """See the protocol."""
        self._core.compiled(grammar)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See the protocol."""
        check_request(request, self.limits)
        if request.id in self._streams:
            raise UserError(f"request id {request.id!r} is in flight already")
        self._thread.require_ready()
        stream = self._streams[request.id] = _Stream()
        is_ended = False
        try:
            await asyncio.wrap_future(self._thread.add(request))
            while not is_ended:
                output = await stream.get()
                if isinstance(output, Exception):
                    is_ended = True
                    raise output
                is_ended = output.finish_reason is not None
                yield output
        finally:
            self._streams.pop(request.id, None)
            if not is_ended:
                self._thread.leave(request.id)

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """See the protocol."""
        await asyncio.wrap_future(self._thread.abort(ids))

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See the protocol; ``wait`` finishes what is in a slot, what waits stays waiting."""
        await asyncio.wrap_future(self._thread.pause(mode))

    async def resume(self) -> None:
        """See the protocol."""
        await asyncio.wrap_future(self._thread.resume())

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: str,
        manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        """See the protocol; ``weights`` is drawn on the engine's thread, between two steps."""
        await asyncio.wrap_future(self._thread.update(weights, version, manifest))

    def health(self) -> Health:
        """See the protocol."""
        return self._thread.health()

    async def close(self) -> None:
        """See the protocol."""
        if (done := self._thread.close()) is not None:
            await asyncio.wrap_future(done)
        self._thread.join()

    # What follows runs on the engine's thread.

    def _deliver(self, deliveries: Deliveries) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Output | Exception]]] = {}
        for name, output in deliveries:
            if (stream := self._streams.get(name)) is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, pairs in by_loop.items():
            loop.call_soon_threadsafe(_put_all, pairs)


def _put_all(pairs: list[tuple[_Stream, Output | Exception]]) -> None:
    for stream, output in pairs:
        stream.put_nowait(output)
