"""One server's part in a round of new weights: vLLM's verbs, the weights as files.

Our server says where files are to lie, answers nothing during a round, and compares digests at its
end. vLLM with ``engine/transfer/vllm_files.py`` does none of the three: whoever started it names
the directory, and its version is another one until the round is whole.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_k2.engine.protocol import NO_WEIGHTS, EngineError, UpdateCode, UpdateError
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
        directory: that a server reads which does not say it itself.
    """

    def __init__(
        self, client: Client, state: State, version: str, directory: Path | None = None
    ) -> None:
        self._client, self._state, self._version = client, state, version
        self._given, self._compares = directory, True
        self._folder: BucketFolder | None = None

    async def begin(self) -> None:
        """The server answers nothing from here on.

        Raises:
            EngineError: it does not do it, or takes no files.
        """
        init = {"init_info": {"backend": "files"}}
        place = await self._post("/init_weight_transfer_engine", init)
        said = place.get("directory") if isinstance(place, dict) else None
        if said is None and self._given is None:
            raise EngineError(f"{self._state.endpoint.base} names no directory for new weights")
        self._folder, self._compares = (
            BucketFolder(Path(said or str(self._given))),
            said is not None,
        )
        if not self._compares:
            await self._post("/update_weight_version", {"new_version": NO_WEIGHTS})
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
        body = {"weight_version": self._version}
        if self._compares:
            await self._end_compared(manifest, body)
        else:
            await self._post("/finish_weight_update", body)
        info = await self._client.once(self._state, "GET", "/weight_info")
        if (served := info.get("weight_version")) != self._version:
            raise UpdateError(
                UpdateCode.VERSION,
                f"{self._state.endpoint.base} says that it serves {served!r}, "
                f"not {self._version!r}",
            )

    async def _end_compared(self, manifest: Manifest, body: dict[str, str]) -> None:
        assert self._folder is not None
        name = await asyncio.to_thread(self._folder.write_manifest, manifest)
        try:
            await self._post("/finish_weight_update", body | {"manifest": name})
        finally:
            self._folder.remove(name)

    async def _post(self, path: str, body: Any) -> Any:
        return await self._client.once(self._state, "POST", path, body)


async def all_of(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Results of all, once all have ended; the first failure is the error."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found
