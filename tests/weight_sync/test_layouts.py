"""A model at several layouts pushes to engines: bit-equal to an export, five rounds in a row.

The export goes through a checkpoint on the disk, the push does not: they share the table of names
alone. Not exercised: GPUs, NCCL, Transformer Engine's modules.
"""

import asyncio
import threading

import pytest
import torch.distributed as dist

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from tests.support.distributed import run_ranks
from tests.weight_sync.worker import NUM_ROUNDS, differing, expected_of, new_engine

pytestmark = pytest.mark.dist

TP2_EP2 = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
WORLDS = {
    2: {
        "tp1": {},
        "pp2": PP2,
        "pp2vpp2": VPP2,
        "tp2ep2": TP2_EP2,
        "tp2ep2 in bf16": TP2_EP2,
    },
    4: {"tp2ep2pp2": TP2_EP2 | PP2},
}


class Listener(threading.Thread):
    """An engine in this process, on a channel, for one round."""

    def __init__(self):
        super().__init__(daemon=True)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.engine, self.weights = new_engine()
        self.version = ""
        self.start()

    def run(self):
        from megatron_k2.weight_sync.broadcast import receive_round
        from megatron_k2.weight_sync.channel import Channel

        channel = Channel(self.store, 1, 2)
        self.version = asyncio.run(receive_round(channel, self.engine))


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "hf"
    export(checkpoints / "replicated", out, ExportOptions(dtype="fp32"))
    return out


@pytest.mark.parametrize("world_size", WORLDS)
def test_five_rounds_are_bit_equal_to_an_export(checkpoints, exported, tmp_path, world_size):
    listener = Listener()
    cases = [
        {
            "layout": layout,
            "load": str(checkpoints / "replicated"),
            "export": str(exported),
            "save": str(tmp_path / name),
            "dtype": "bf16" if "bf16" in name else "fp32",
            "port": 0,
        }
        for name, layout in WORLDS[world_size].items()
    ]
    cases[-1 if world_size == 4 else 1]["port"] = listener.store.port
    run_ranks("tests.weight_sync.worker", world_size, cases, tmp_path / "logs")
    listener.join(30)
    assert listener.version == "over"
    assert not differing(listener.weights.held, expected_of(exported, NUM_ROUNDS))
    export(
        tmp_path / "tp2ep2pp2" if world_size == 4 else tmp_path / "pp2",
        tmp_path / "after",
        ExportOptions(dtype="fp32"),
    )
    assert not differing(listener.weights.held, expected_of(tmp_path / "after", 0))
    asyncio.run(listener.engine.close())
