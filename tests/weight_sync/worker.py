"""A sharded model that pushes its weights: ``python -m tests.weight_sync.worker JSON``.

A case is ``{"layout", "load", "export", "save", "dtype", "port"}``: build the tiny model at a
layout, fill it from a checkpoint, change it and push it five times into an engine of rank 0's
process, and then, where there is a port, once over a channel. Rank 0 compares what the engine holds
with the export's tensors changed in the same way, and saves the model's last state.
"""

import asyncio
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.checkpoint.build_checkpoints import TINY, build_model, load, save
from tests.support.cases import run_each

NUM_ROUNDS = 5
BUCKET_BYTES = 8_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def changed(tensor, number):
    """What an optimizer's step is here: the same numbers at every layout."""
    return tensor.mul_(1.01).add_(0.003 * number)


def change(model, number):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if torch.is_tensor(tensor) and not name.endswith("_extra_state"):
                changed(tensor, number)


def expected_of(export, number):
    """An export's tensors after so many changes, by name."""
    from safetensors.torch import load_file

    found = {}
    for shard in sorted(Path(export).glob("*.safetensors")):
        found |= load_file(shard)
    for tensor in found.values():
        for each in range(1, number + 1):
            changed(tensor, each)
    return found


def new_engine(dtype=torch.float32):
    from megatron_k2.engine.local.core import Core
    from megatron_k2.engine.local.engine import LocalEngine
    from megatron_k2.engine.local.weights import Weights

    weights = Weights(TINY, dtype, torch.device("cpu"))
    return LocalEngine(Core(weights, num_slots=2, max_length=32)), weights


def differing(held, expected, dtype=torch.float32):
    """Names that are not the expected ones, sent in ``dtype``; biases of routers stay fp32."""
    assert held.keys() == expected.keys()
    cast = {
        name: (value if name.endswith("correction_bias") else value.to(dtype)).to(held[name].dtype)
        for name, value in expected.items()
    }
    return [name for name in held if not held[name].equal(cast[name])]


def run(case):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_k2.host.cpu import cpu_host

    dist.init_process_group("gloo")
    with cpu_host():
        parallel_state.initialize_model_parallel(**case["layout"], expert_tensor_parallel_size=1)
        model_parallel_cuda_manual_seed(1)
        num_virtual = case["layout"].get("virtual_pipeline_model_parallel_size")
        numbers = [None] if num_virtual is None else range(num_virtual)
        stages = [build_model(vp_stage=number, **case["layout"]) for number in numbers]
        load(stages, Path(case["load"]))
        asyncio.run(rounds(case, stages))
        save(stages, Path(case["save"]), "rope")


async def rounds(case, stages):
    from megatron_k2.weight_sync.push import push
    from megatron_k2.weight_sync.source import WeightSource

    dtype = DTYPES[case["dtype"]]
    source = WeightSource(stages, TINY, dtype=dtype, bucket_bytes=BUCKET_BYTES)
    engine, weights = new_engine(dtype) if source.is_root else (None, None)
    for number in range(1, NUM_ROUNDS + 1):
        for stage in stages:
            change(stage, number)
        found = await push(source, engine, f"v{number}")
        assert found.is_whole, found
        if engine is not None:
            assert engine.health()[:4:3] == (True, f"v{number}")
            expected = expected_of(case["export"], number)
            assert not (wrong := differing(weights.held, expected, dtype)), wrong
            sent = sum(place.numel() for place in weights.held.values()) * dtype.itemsize
            in_fp32 = sum(p.numel() for n, p in weights.held.items() if "correction" in n)
            assert found.num_bytes == sent + in_fp32 * (4 - dtype.itemsize)
    if case["port"]:
        await over_a_channel(case, source)
    if engine is not None:
        await engine.close()


async def over_a_channel(case, source):
    from megatron_k2.weight_sync.channel import Channel
    from megatron_k2.weight_sync.push import push_over

    channel = None
    if source.is_root:
        channel = Channel(dist.TCPStore("127.0.0.1", case["port"], is_master=False), 0, 2)
    found = await push_over(channel, source, "over", BUCKET_BYTES)
    assert found.is_whole, found


if __name__ == "__main__":
    run_each(run, json.loads(Path(sys.argv[1]).read_text()))
