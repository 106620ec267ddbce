"""New weights over HTTP, by vLLM's verbs: an open round, fed file by file, finished or abandoned.

From ``start`` to a ``finish`` that succeeds the engine answers 503. A trainer that dies in between
leaves it so, and the next ``start`` ends what was open.
"""

import asyncio
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from megatron_k2.engine.protocol import Engine, UpdateCode, UpdateError
from megatron_k2.engine.server.attending import Failure
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError

BACKEND = "files"
"""The one way for weights to come: safetensors files of a directory on this machine."""


class _Feed:
    """What the engine draws from, on its own thread, while bodies come in.

    Args:
        folder: of the buckets.
        seconds: that the engine waits for the next body.
    """

    def __init__(self, folder: BucketFolder, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._coming: queue.SimpleQueue[tuple[str, Future[None]] | Manifest | UpdateError] = (
            queue.SimpleQueue()
        )
        self._manifest: Manifest | None = None
        self.begun: Future[None] = Future()
        """Done when the engine has stopped answering."""

    def put(self, name: str) -> Future[None]:
        """A bucket's file; done when the engine has it."""
        done: Future[None] = Future()
        self._coming.put((name, done))
        return done

    def end(self, last: Manifest | UpdateError) -> None:
        """All have come, or no more will."""
        self._coming.put(last)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """For the engine."""
        self.begun.set_result(None)
        while True:
            try:
                item = self._coming.get(timeout=self._seconds)
            except queue.Empty:
                raise UpdateError(
                    UpdateCode.DELIVERY, f"nothing came for {self._seconds:g} seconds"
                ) from None
            if isinstance(item, UpdateError):
                raise item
            if isinstance(item, Manifest):
                self._manifest = item
                return
            name, done = item
            yield from self._folder.read(name)
            done.set_result(None)

    def manifest(self) -> Manifest:
        """For the engine, once it has drawn all."""
        assert self._manifest is not None
        return self._manifest


class WeightUpdates:
    """The verbs.

    Args:
        engine: whose weights are replaced.
        folder: that they may come from; ``None``: nowhere.
        seconds: between two bodies of one round.
    """

    def __init__(self, engine: Engine, folder: BucketFolder | None, seconds: float) -> None:
        self._engine, self._folder, self._seconds = engine, folder, seconds
        self._feed: _Feed | None = None
        self._task: asyncio.Task[None] | None = None
        self._version = ""
        self._starting = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether a round has begun and not ended."""
        return self._task is not None and not self._task.done()

    def describe(self, backend: str) -> dict[str, Any]:
        """``/init_weight_transfer_engine``: where to write.

        Raises:
            UserError: another way was asked for, or none is open here.
        """
        if backend != BACKEND:
            raise UserError(f"init_info.backend {backend!r}: '{BACKEND}' is what is spoken here")
        return {"backend": BACKEND, "directory": str(self._require_folder().directory)}

    async def start(self, version: str) -> None:
        """``/start_weight_update``: the engine answers nothing from here on."""
        folder = self._require_folder()
        async with self._starting:
            await self.abandon("another update began")
            feed = self._feed = _Feed(folder, self._seconds)
            self._version = version
            self._task = asyncio.create_task(
                self._engine.update_weights(feed.tensors(), version, feed.manifest)
            )
            self._task.add_done_callback(asyncio.Task.exception)  # told by whoever asks next
            await self._or_failed(feed.begun)

    async def take(self, name: str) -> None:
        """``/update_weights``: one bucket; returns when the file may go.

        Raises:
            UserError: the name is not one of the directory's; the round stays open.
            UpdateError: the round has failed.
        """
        feed = self._require_open()
        self._require_folder().require(name)
        await self._or_failed(feed.put(name))

    async def finish(self, version: str, manifest: str) -> None:
        """``/finish_weight_update``: that was all; the engine compares, and answers again.

        Raises:
            UserError: there is no such manifest; the round stays open.
            UpdateError: the engine does not hold what was sent, under this version.
        """
        feed = self._require_open()
        found = self._require_folder().read_manifest(manifest)
        said = f"begun as {self._version!r}, finished as {version!r}"
        is_same = version == self._version
        feed.end(found if is_same else UpdateError(UpdateCode.VERSION, said))
        assert self._task is not None
        await asyncio.shield(self._task)

    async def abandon(self, why: str) -> None:
        """End an open round; the engine stays without weights."""
        if self._feed is not None and self._task is not None and self.is_open:
            self._feed.end(UpdateError(UpdateCode.SOURCE, why))
            await asyncio.wait({self._task})

    async def _or_failed(self, done: Future[None]) -> None:
        """Wait for the engine, or for the round's failure."""
        assert self._task is not None
        waiting = asyncio.wrap_future(done)
        await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            self._task.result()

    def _require_folder(self) -> BucketFolder:
        if self._folder is None:
            raise UserError("this server takes no weights: start it with --weights-dir")
        return self._folder

    def _require_open(self) -> _Feed:
        if self._feed is None or not self.is_open:
            raise Failure(409, "no update is open; POST /start_weight_update first")
        return self._feed

    def require_closed(self) -> None:
        """Refuse what would wait for an open round's end.

        Raises:
            Failure: one is open.
        """
        if self.is_open:
            raise Failure(503, f"weights {self._version!r} are half in; finish the update first")
