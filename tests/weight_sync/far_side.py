"""One end of a channel that dies: ``python -m tests.weight_sync.far_side JSON``.

``{"role": "sender" | "engine", "port", "kill_at"}``: takes part in one whole round, ``old``, and
in a second, ``new``, in which it gets SIGKILL before its message number ``kill_at``.
"""

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.transfer.manifest import Counted
from megatron_k2.weight_sync.broadcast import receive_round, send_round
from megatron_k2.weight_sync.channel import Channel
from tests.support.shapes import SMALL

SHAPE = replace(SMALL, num_layers=2, num_moe_experts=4)
BUCKET_BYTES = 20_000
VERSIONS = ("old", "new")


class Mortal(Channel):
    """A channel whose end dies before one message of its second round."""

    def __init__(self, *arguments, kill_at=None):
        super().__init__(*arguments)
        self.kill_at, self.num_messages = kill_at, 0

    def _live(self):
        if self.num_messages == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_messages += 1

    def broadcast(self, tensor):
        self._live()
        super().broadcast(tensor)

    def answers(self, mine):
        self._live()
        return super().answers(mine)


def tensors_of(version):
    """Random weights by name, of a version."""
    generator = torch.Generator().manual_seed(VERSIONS.index(version))
    names = Weights(SHAPE, torch.float32, torch.device("cpu")).held
    return {name: torch.randn(place.shape, generator=generator) for name, place in names.items()}


def send(channel, version):
    counted = Counted(tensors_of(version).items(), version)
    send_round(channel, counted, version, BUCKET_BYTES)


def new_engine():
    weights = Weights(SHAPE, torch.float32, torch.device("cpu"))
    return LocalEngine(Core(weights, num_slots=1, max_length=16)), weights


def main(case):
    rank = 0 if case["role"] == "sender" else 1
    store = dist.TCPStore("127.0.0.1", case["port"], is_master=False)
    channel = Mortal(store, rank, 2)
    engine = None if rank == 0 else new_engine()[0]
    for version in VERSIONS:
        if version == "new":
            channel.num_messages, channel.kill_at = 0, case["kill_at"]
        if engine is None:
            send(channel, version)
        else:
            asyncio.run(receive_round(channel, engine))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
