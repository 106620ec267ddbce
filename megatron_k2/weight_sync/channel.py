"""A gloo group of one sender and the engines it feeds, beside Megatron's own groups."""

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.engine.protocol import UpdateCode, UpdateError

_ANSWER_BYTES = 4096


class Channel:
    """The group, as one of its ranks.

    Args:
        store: in which they meet, ``torch.distributed.TCPStore``.
        rank: 0 for the sender.
        size: sender and receivers.
        seconds: that any message may take. Whoever is gone is noticed at once; who hangs, then.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, seconds: float = 600.0) -> None:
        # torch's stubs leave a group's own operations out
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=seconds))
        self.is_sender = rank == 0

    def broadcast(self, tensor: Tensor) -> None:
        """From the sender into everyone's ``tensor``.

        Raises:
            UpdateError: somebody has gone.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._group.broadcast([tensor], options).wait()
        except RuntimeError as error:
            raise self._gone(error) from None

    def broadcast_json(self, value: Any = None) -> Any:
        """The sender's value, at everyone's."""
        text = json.dumps(value).encode()
        length = torch.tensor([len(text)])
        self.broadcast(length)
        content = torch.empty(int(length), dtype=torch.uint8)
        if self.is_sender:
            content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.broadcast(content)
        return json.loads(content.numpy().tobytes())

    def answers(self, mine: str) -> list[str]:
        """What every rank says, in their order; all must ask.

        Raises:
            UpdateError: somebody has gone.
        """
        said = torch.zeros(_ANSWER_BYTES, dtype=torch.uint8)
        text = mine.encode()[:_ANSWER_BYTES]
        said[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        found = [torch.empty_like(said) for _ in range(self._group.size())]
        try:
            self._group.allgather([found], [said]).wait()
        except RuntimeError as error:
            raise self._gone(error) from None
        return [each.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for each in found]

    def _gone(self, error: RuntimeError) -> UpdateError:
        code = UpdateCode.ENGINE if self.is_sender else UpdateCode.SOURCE
        return UpdateError(code, f"the other side has gone: {str(error).splitlines()[0]}")
