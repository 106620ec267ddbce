"""What an update of weights costs, by the way that it travels, beside copying the same bytes.

A model of a preset lies whole on one rank, random, in fp32; the engine is the embedded one. Rounds
of each way are interleaved with the floor: one copy of every tensor into its place, which is what
the engine's own part of any round is. ``digests`` is the share that being sure takes: SHA-256 over
every byte, by the sender and by the engine. ``files`` writes buckets to a tmpfs and maps them, what
a server and its client do but for HTTP; ``channel`` goes through gloo, the engine on a thread.

    python benchmarks/weight_update.py [--preset k2-mini] [--rounds 5] [--seed 0]
"""

import argparse
import asyncio
import contextlib
import io
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from harness import machine_lock, paired_medians, print_inputs, print_result
from torch import Tensor

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import UpdateError
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.engine.transfer.buckets import BUCKET_BYTES, buckets_of
from megatron_k2.engine.transfer.manifest import Counted, digest_of
from megatron_k2.presets import get_preset
from megatron_k2.weight_sync.broadcast import receive_round, send_round
from megatron_k2.weight_sync.channel import Channel
from megatron_k2.weight_sync.source import WeightSource

SHARED_MEMORY = Path("/dev/shm")


class Receiver(threading.Thread):
    """An engine on a channel, until the process ends."""

    def __init__(self, engine: LocalEngine) -> None:
        super().__init__(daemon=True)
        self.engine = engine
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.start()

    def run(self) -> None:
        store = dist.TCPStore("127.0.0.1", self.store.port, is_master=False)
        channel = Channel(store, 1, 2)
        with contextlib.suppress(UpdateError):  # the sender has gone
            while True:
                asyncio.run(receive_round(channel, self.engine))


def through_files(folder: BucketFolder, tensors: Iterable[tuple[str, Tensor]]) -> Iterator:
    """Buckets written, mapped again and removed."""
    for bucket in buckets_of(tensors, BUCKET_BYTES):
        name = folder.write(bucket)
        yield from folder.read(name)
        folder.remove(name)


def ways(
    source: WeightSource, engine: LocalEngine, held: Mapping[str, Tensor], folder: BucketFolder
) -> dict[str, Callable[[], None]]:
    """What is measured; every way but the floor ends in an engine that vouches for its weights."""
    listener = Receiver(engine)
    channel = Channel(listener.store, 0, 2)
    sent = {name: tensor.clone() for name, tensor in source.tensors()}

    def floor() -> None:
        for name, tensor in sent.items():
            held[name].copy_(tensor)

    def digests() -> None:
        for name, tensor in sent.items():
            digest_of(name, tensor)
        for name, place in held.items():
            digest_of(name, place)

    def updated(change: Callable[[Iterable], Iterable]) -> None:
        counted = Counted(source.tensors(), "1")
        asyncio.run(engine.update_weights(change(counted), "1", counted.manifest))

    return {
        "floor": floor,
        "digests": digests,
        "in_process": lambda: updated(lambda tensors: tensors),
        "files": lambda: updated(lambda tensors: through_files(folder, tensors)),
        "channel": lambda: send_round(channel, Counted(source.tensors(), "1"), "1"),
    }


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Bytes and, by way, seconds of a round and how often the floor's."""
    from megatron_k2.selfcheck.one_rank import build, one_rank, randomise

    preset = get_preset(options.preset)
    shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with one_rank(), tempfile.TemporaryDirectory(dir=shared) as folder:
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints its arguments
            model = build(preset)
        randomise(model, options.seed)
        weights = Weights(preset, torch.float32, torch.device("cpu"))
        engine = LocalEngine(Core(weights, num_slots=1, max_length=64))
        source = WeightSource([model], preset, dtype=torch.float32)
        candidates = ways(source, engine, weights.held, BucketFolder(Path(folder)))
        timings = paired_medians(candidates, options.rounds, options.seed)
    found = {"gigabytes": weights.num_bytes / 1e9}
    floor = timings["floor"].wall_seconds
    for name, timing in timings.items():
        rate = found["gigabytes"] / timing.wall_seconds
        print(
            f"{name}: {timing.wall_seconds:.3f} s wall, {timing.cpu_seconds:.3f} s of CPU, "
            f"{rate:.2f} GB/s, {timing.wall_seconds / floor:.1f}x the floor, "
            f"spread {timing.spread:.2f}"
        )
        found[f"{name}_seconds"] = timing.wall_seconds
        found[f"{name}_cpu_seconds"] = timing.cpu_seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="k2-mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with machine_lock():
        print_inputs(**vars(options))
        print_result(**measured(options))


if __name__ == "__main__":
    main()
