"""One server's part in a round of new weights: vLLM's verbs, the weights as files.

Our server says where files are to lie, answers nothing during a round, and compares digests at its
end. vLLM with ``engine/transfer/vllm_files.py`` does none of the three: whoever started it names
the directory, and its version is another one until the round is whole.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.engine.protocol import NO_WEIGHTS, EngineError, UpdateCode, UpdateError
from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.endpoints import State
from megatron_k2.engine.transfer.bucket_files import BucketFolder


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

    @property
    def folder(self) -> BucketFolder:
        """Where files for it are to lie; from ``begin`` on."""
        assert self._folder is not None
        return self._folder

    async def begin(self) -> None:
        """The server answers nothing from here on.

        Raises:
            EngineError: it does not do it, or takes no files.
            UserError: its directory is not here: it lies on another machine.
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

    async def give(self, name: str) -> None:
        """Some of the weights, in a file; the server has them when this returns."""
        await self._post("/update_weights", {"update_info": {"file": name}})

    async def end(self, manifest: str) -> None:
        """That was all: the server compares what it holds with what was sent.

        Args:
            manifest: name of the file that says it.

        Raises:
            UpdateError: it holds something else, or says afterwards that it serves other weights.
        """
        body = {"weight_version": self._version}
        await self._post(
            "/finish_weight_update", body | ({"manifest": manifest} if self._compares else {})
        )
        info = await self._client.once(self._state, "GET", "/weight_info")
        if (served := info.get("weight_version")) != self._version:
            raise UpdateError(
                UpdateCode.VERSION,
                f"{self._state.endpoint.base} says that it serves {served!r}, "
                f"not {self._version!r}",
            )

    async def _post(self, path: str, body: Any) -> Any:
        return await self._client.once(self._state, "POST", path, body)


@contextlib.asynccontextmanager
async def in_files(
    rounds: Sequence[FileRound], write: Callable[[BucketFolder], str]
) -> AsyncIterator[Mapping[FileRound, str]]:
    """What ``write`` writes, once in each directory: of each round the file's name, in the block.

    Args:
        rounds: begun. Several may read the same directory.
        write: gives the name.
    """
    folders = {each.folder.directory: each.folder for each in rounds}
    names: dict[Path, str] = {}
    try:
        for directory, folder in folders.items():
            names[directory] = await asyncio.to_thread(write, folder)
        yield {each: names[each.folder.directory] for each in rounds}
    finally:
        for directory, name in names.items():
            folders[directory].remove(name)


async def all_of(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Results of all, once all have ended; the first failure is the error."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found
