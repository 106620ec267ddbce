"""A preset's model, sharded, that pushes: ``python -m tests.weight_sync.preset_worker JSON``.

A case is ``{"preset", "flags", "base", "export", "rounds", "is_stale", "out"}``. Without ``out``
the model gets numbers and is saved as ``base``, by one rank. With it it is filled from ``base``.
Without an export rank 0 writes to ``out`` what a source gives out in block FP8. With one the model
is changed and pushed so often into an engine of rank 0's process, which compares what that holds
with the export changed in the same way (``is_stale``: as of the round before) and writes how it
went.
"""

import asyncio
import contextlib
import dataclasses
import io
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_k2.presets import get_preset
from megatron_k2.selfcheck.one_rank import arguments, build, randomise
from tests.support.cases import run_each
from tests.weight_sync.worker import change, differing, expected_of

BUCKET_BYTES = 32 << 20
SIZES = {
    "--tensor-model-parallel-size": "tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "pipeline_model_parallel_size",
    "--expert-model-parallel-size": "expert_model_parallel_size",
    "--expert-tensor-parallel-size": "expert_tensor_parallel_size",
}


def run(case):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_k2.host.cpu import cpu_host

    dist.init_process_group("gloo")
    flags, preset = case["flags"], get_preset(case["preset"])
    sizes = {SIZES[f]: int(flags[i + 1]) for i, f in enumerate(flags) if f in SIZES}
    with cpu_host():
        parallel_state.initialize_model_parallel(**sizes)
        model_parallel_cuda_manual_seed(1)
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints its arguments
            model, args = build(preset, *flags), arguments(preset, *flags)
        if not case["out"]:
            randomise(model)
            save(model, args, Path(case["base"]))
            return
        load(model, case["base"])
        if case["export"]:
            asyncio.run(rounds(case, model, preset))
        else:
            quantized(case, model, preset)


def quantized(case, model, preset):
    from megatron_k2.checkpoint.hf.quantization import quantization_like
    from megatron_k2.weight_sync.source import WeightSource

    fp8 = quantization_like(None)
    source = WeightSource([model], preset, fp8=fp8, bucket_bytes=BUCKET_BYTES)
    found = {name: tensor.clone() for name, tensor in source.tensors()}
    if source.is_root:
        torch.save(found, case["out"])


def save(model, args, directory):
    from megatron.core import dist_checkpointing

    directory.mkdir(parents=True)
    state = {"model": model.sharded_state_dict(), "args": args, "iteration": 1}
    dist_checkpointing.save(state | {"checkpoint_version": 3.0}, str(directory))


def load(model, directory):
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, directory)
    model.load_state_dict(loaded["model"], strict=False)


async def rounds(case, model, preset):
    from megatron_k2.engine.local.core import Core
    from megatron_k2.engine.local.engine import LocalEngine
    from megatron_k2.engine.local.weights import Weights
    from megatron_k2.weight_sync.push import push
    from megatron_k2.weight_sync.source import WeightSource

    source = WeightSource([model], preset, dtype=torch.float32, bucket_bytes=BUCKET_BYTES)
    engine = None
    if source.is_root:
        weights = Weights(preset, torch.float32, torch.device("cpu"))
        engine = LocalEngine(Core(weights, num_slots=1, max_length=32))
    found = []
    for number in range(1, case["rounds"] + 1):
        change(model, number)
        ended = await push(source, engine, f"v{number}")
        assert ended.is_whole, ended
        if engine is not None:
            expected = expected_of(case["export"], number - case["is_stale"])
            facts = dataclasses.asdict(ended) | {"floor_seconds": copied(expected)}
            found.append(facts | {"num_wrong": len(differing(weights.held, expected))})
    if engine is not None:
        await engine.close()
        Path(case["out"]).write_text(json.dumps(found))


def copied(tensors):
    """Seconds of one copy of every tensor into a place of its own that was written before."""
    places = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    begin = time.perf_counter()
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    return time.perf_counter() - begin


if __name__ == "__main__":
    run_each(run, json.loads(Path(sys.argv[1]).read_text()))
