"""One server's part in a round of new weights: vLLM's verbs, the weights as files."""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_k2.engine.protocol import EngineError, UpdateCode, UpdateError
from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.endpoints import State
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.engine.transfer.manifest import Manifest


class FileRound:
    """See the module; ``begin``, ``give`` as often as there are buckets, ``end``.

    Where one of them raises, the round is over, and the server answers nothing until another one
    is whole.

    Args:
        client: of the server.
        state: which of the client's endpoints it is.
        version: of the weights.
    """

    def __init__(self, client: Client, state: State, version: str) -> None:
        self._client, self._state, self._version = client, state, version
        self._folder: BucketFolder | None = None

    async def begin(self) -> None:
        """The server answers nothing from here on.

        Raises:
            EngineError: it does not do it, or takes no files.
        """
        init = {"init_info": {"backend": "files"}}
        place = await self._post("/init_weight_transfer_engine", init)
        if not isinstance(place, dict) or "directory" not in place:
            raise EngineError(f"{self._state.endpoint.base} names no directory for new weights")
        self._folder = BucketFolder(Path(place["directory"]))
        await self._post("/start_weight_update", {"weight_version": self._version})

    async def give(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Some of the weights; the server has them when this returns."""
        assert self._folder is not None
        name = await asyncio.to_thread(self._folder.write, bucket)
        try:
            await self._post("/update_weights", {"update_info": {"file": name}})
        finally:
            self._folder.remove(name)

    async def end(self, manifest: Manifest) -> None:
        """That was all: the server compares what it holds with what was sent.

        Raises:
            UpdateError: it holds something else, or says afterwards that it serves other weights.
        """
        assert self._folder is not None
        name = await asyncio.to_thread(self._folder.write_manifest, manifest)
        try:
            body = {"weight_version": self._version, "manifest": name}
            await self._post("/finish_weight_update", body)
        finally:
            self._folder.remove(name)
        info = await self._client.once(self._state, "GET", "/weight_info")
        if (served := info.get("weight_version")) != self._version:
            raise UpdateError(
                UpdateCode.VERSION,
                f"{self._state.endpoint.base} says that it serves {served!r}, "
                f"not {self._version!r}",
            )

    async def _post(self, path: str, body: Any) -> Any:
        return await self._client.once(self._state, "POST", path, body)


async def all_of(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Results of all, once all have ended; the first failure is the error."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found
