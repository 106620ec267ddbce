"""Rounds over a ``Channel``: the sender's buckets, and an engine that takes them.

Before each bucket goes a header: the round, the bucket's place in it, names, dtypes and shapes. A
receiver takes buckets in this order only, so that one that was lost, came twice or belongs to
another round ends the round. After the last, every receiver says how its engine took it.
"""

import asyncio
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from megatron_k2.engine.protocol import Engine, UpdateCode, UpdateError
from megatron_k2.engine.transfer.buckets import BUCKET_BYTES, buckets_of
from megatron_k2.engine.transfer.manifest import DTYPES, NAMES, Counted, Manifest
from megatron_k2.weight_sync.channel import Channel
from megatron_k2.weight_sync.packing import Place, places_of, room_for

type _Named = tuple[str, str, list[int]]
"""Name, dtype and shape, as a header says them."""


def _places(named: Iterable[_Named]) -> list[Place[str]]:
    return places_of((name, DTYPES[dtype], tuple(shape)) for name, dtype, shape in named)


def send_round(
    channel: Channel, counted: Counted, version: str, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Send a round, and hear how the engines took it.

    Raises:
        UpdateError: an engine refused, or has gone.
        Exception: of the tensors' source; the engines have been told, and refuse until a round
            is whole.
    """
    try:
        for index, bucket in enumerate(buckets_of(counted, bucket_bytes)):
            _send_bucket(channel, version, index, bucket)
    except UpdateError:
        raise
    except Exception as error:
        channel.broadcast_json({"version": version, "stopped": str(error)[:1000]})
        channel.answers("")
        raise
    manifest = counted.manifest()
    channel.broadcast_json({"version": version, "end": json.loads(manifest.to_json())})
    _require_taken(channel.answers(""))


def _send_bucket(
    channel: Channel, version: str, index: int, bucket: list[tuple[str, Tensor]]
) -> None:
    named = [(name, NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in bucket]
    places = _places(named)
    packed = room_for(places)
    for place, (_, tensor) in zip(places, bucket, strict=True):
        place.of(packed).copy_(tensor)
    channel.broadcast_json({"version": version, "bucket": index, "tensors": named})
    channel.broadcast(packed)


def _require_taken(answers: list[str]) -> None:
    for rank, answer in enumerate(answers[1:], start=1):
        if answer:
            code, _, detail = answer.partition(" ")
            raise UpdateError(UpdateCode(code), f"engine {rank}: {detail}")


class Received:
    """One round, as a receiver's engine draws it.

    Raises:
        UpdateError: the sender has gone before its first message.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._manifest: Manifest | None = None
        self._first: dict[str, Any] | None = channel.broadcast_json()
        self._is_over = False
        self.version = str((self._first or {}).get("version"))
        """As its first message says."""

    def _next(self) -> tuple[dict[str, Any], Tensor | None]:
        """A message: its header and, of a bucket, its bytes."""
        header = self._first or self._channel.broadcast_json()
        self._first = None
        self._is_over = "tensors" not in header
        if self._is_over:
            return header, None
        packed = room_for(_places(header["tensors"]))
        self._channel.broadcast(packed)
        return header, packed

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, views of the bucket: copy what is kept.

        Raises:
            UpdateError: the sender has gone or stopped, or a bucket is not the next one.
        """
        for index in itertools.count():
            header, packed = self._next()
            if header["version"] != self.version:
                raise UpdateError(
                    UpdateCode.VERSION,
                    f"weights {header['version']!r} among those of {self.version!r}",
                )
            if "stopped" in header:
                raise UpdateError(UpdateCode.SOURCE, f"the sender stopped: {header['stopped']}")
            if packed is None:
                self._manifest = Manifest.from_json(json.dumps(header["end"]))
                return
            if header["bucket"] != index:
                raise UpdateError(
                    UpdateCode.DELIVERY, f"bucket {header['bucket']} came where {index} was due"
                )
            for place in _places(header["tensors"]):
                yield place.key, place.of(packed)

    def manifest(self) -> Manifest:
        """What the sender says it sent; once all have been drawn."""
        if self._manifest is None:
            raise UpdateError(UpdateCode.DELIVERY, "the round was cut before its end")
        return self._manifest

    def drain(self) -> None:
        """Take what is still coming, so that the sender and other receivers go on."""
        while not self._is_over:
            self._next()


async def receive_round(channel: Channel, engine: Engine) -> str:
    """Take one round into an engine, and tell the sender how that went; the round's version.

    Raises:
        UpdateError: the sender has gone. What an engine refuses is told to the sender instead: the
            engine is not ready then, and the next round may mend it.
    """
    received = await asyncio.to_thread(Received, channel)
    try:
        await engine.update_weights(received.tensors(), received.version, received.manifest)
        answer = ""
    except UpdateError as error:
        answer = f"{error.code} {error}"
    await asyncio.to_thread(received.drain)
    await asyncio.to_thread(channel.answers, answer)
    return received.version
