"""One round of weights from every trainer rank's side, and how it ended.

``push`` is for the engine that the root reaches by the protocol: in its own process, or a remote
one. ``push_over`` is for engines that listen on a ``Channel``. Both are collective over the
source's ranks and end on all of them together with the same result. A round that failed is no
exception: whether to try again or to stop is the trainer's to say, by the code. Only a rank that
has gone is one, on those that waited for it.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch.distributed as dist

from megatron_k2.engine.protocol import Engine, EngineError, UpdateCode, UpdateError
from megatron_k2.engine.transfer.buckets import BUCKET_BYTES
from megatron_k2.engine.transfer.manifest import Counted
from megatron_k2.errors import UserError
from megatron_k2.weight_sync.broadcast import send_round
from megatron_k2.weight_sync.channel import Channel
from megatron_k2.weight_sync.source import WeightSource


@dataclass(frozen=True)
class Round:
    """How a round ended."""

    version: str
    code: UpdateCode
    detail: str
    """A sentence; empty where all went well."""
    num_tensors: int
    num_bytes: int
    """Sent by the root."""
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether every engine serves this version, and just that."""
        return self.code is UpdateCode.OK


async def push(source: WeightSource, engine: Engine | None, version: str) -> Round:
    """Replace the weights of an engine.

    Args:
        source: of this rank.
        engine: on the root; ``None`` elsewhere.
        version: to serve them as.
    """

    async def deliver(counted: Counted) -> None:
        assert engine is not None
        await engine.update_weights(counted, version, counted.manifest)
        if (served := engine.health().weight_version) != version:
            raise UpdateError(
                UpdateCode.VERSION, f"the engine says that it serves {served!r}, not {version!r}"
            )

    return await _round(source, version, deliver)


async def push_over(
    channel: Channel | None, source: WeightSource, version: str, bucket_bytes: int = BUCKET_BYTES
) -> Round:
    """Replace the weights of every engine on a channel.

    Args:
        channel: on the root; ``None`` elsewhere.
        source: of this rank.
        version: to serve them as.
        bucket_bytes: sent at once.
    """

    async def deliver(counted: Counted) -> None:
        assert channel is not None
        await asyncio.to_thread(send_round, channel, counted, version, bucket_bytes)

    return await _round(source, version, deliver)


async def _round(
    source: WeightSource, version: str, deliver: Callable[[Counted], Awaitable[None]]
) -> Round:
    begin = time.perf_counter()
    tensors = source.tensors()
    if not source.is_root:
        with contextlib.suppress(UserError):  # of the model, on all ranks: the root says it
            await asyncio.to_thread(list, tensors)  # none: gives its parts to the root
        return _agreed(source, None)
    counted = Counted(tensors, version)
    code, detail = UpdateCode.OK, ""
    try:
        await deliver(counted)
    except UpdateError as error:
        code, detail = error.code, str(error)
    except EngineError as error:
        code, detail = UpdateCode.ENGINE, str(error)
    except Exception as error:
        code, detail = UpdateCode.SOURCE, f"{type(error).__name__}: {error}"
    finally:
        # The other ranks are waiting. A generator that nobody drew from has not begun to give, and
        # would not at its close either.
        with contextlib.suppress(UserError):
            await asyncio.to_thread(next, tensors, None)
        tensors.close()
    num_tensors, seconds = len(counted.manifest().tensors), time.perf_counter() - begin
    return _agreed(source, Round(version, code, detail, num_tensors, counted.num_bytes, seconds))


def _agreed(source: WeightSource, found: Round | None) -> Round:
    """The root's, on every rank."""
    box = [found]
    dist.broadcast_object_list(box, group=source.group, group_src=0)
    assert box[0] is not None
    return box[0]
