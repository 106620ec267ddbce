"""One round of new weights to several engines in step, bucket by bucket; who fails is left out."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from megatron_k2.engine.protocol import EngineError, UpdateCode, UpdateError
from megatron_k2.engine.remote.rounds import FileRound, in_files
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.engine.transfer.buckets import buckets_of
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError
from megatron_k2.rl.cluster.replica import Replica, unless_gone


class Sending:
    """See the module.

    Args:
        targets: that are up.
        version: of the weights.
    """

    def __init__(self, targets: Sequence[Replica], version: str) -> None:
        self._version = version
        self._open = [
            (each, FileRound(each.client, each.state, version, each.weights_directory))
            for each in targets
        ]
        self._failed: list[UpdateError] = []

    async def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        manifest: Callable[[], Manifest],
        bucket_bytes: int,
    ) -> None:
        """The whole round. ``weights`` is drawn once, on a thread.

        Raises:
            UpdateError: no engine has taken it whole.
        """
        for each, _ in self._open:
            each.empty()
        await self._step(FileRound.begin)
        buckets = buckets_of(weights, bucket_bytes)
        while (bucket := await asyncio.to_thread(next, buckets, None)) is not None:
            write = partial(BucketFolder.write, bucket=bucket)
            await self._in_files(write, FileRound.give)
        sent = manifest()
        await self._in_files(partial(BucketFolder.write_manifest, manifest=sent), FileRound.end)
        for each, _ in self._open:
            each.fill(self._version)

    async def _in_files(
        self,
        write: Callable[[BucketFolder], str],
        do: Callable[[FileRound, str], Awaitable[None]],
    ) -> None:
        async with in_files([part for _, part in self._open], write) as names:
            await self._step(lambda part: do(part, names[part]))

    async def _step(self, do: Callable[[FileRound], Awaitable[Any]]) -> None:
        """The same at every engine that is still in the round."""

        async def one(target: Replica, part: FileRound) -> bool:
            try:
                await unless_gone(do(part), target)
            except (EngineError, UserError) as problem:
                code = problem.code if isinstance(problem, UpdateError) else UpdateCode.ENGINE
                self._failed.append(UpdateError(code, str(problem)))
                return False
            return True

        went_well = await asyncio.gather(*(one(*each) for each in self._open))
        self._open = [each for each, well in zip(self._open, went_well, strict=True) if well]
        if not self._open:
            told = "; ".join(dict.fromkeys(map(str, self._failed))) or "none is up"
            code = self._failed[0].code if self._failed else UpdateCode.ENGINE
            raise UpdateError(code, f"no engine took weights {self._version!r} whole: {told}")
