"""A model with adapters that pushes its weights: ``python -m tests.weight_sync.lora_worker JSON``.

A case is ``{"layout", "base", "load", "out", "dtype", "scale_twice"}``: the tiny model with
adapters over the base, at a layout, from a checkpoint of adapters (without one: they get numbers).
It is pushed twice, changed in between; each time rank 0 writes what the engine holds to
``out/held_<round>.pt`` and all save the adapters to ``out/<round>``. As dtype "fp8" there is no
engine, and what the source gives out is written.
"""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_k2.model.lora.settings import settings_of
from tests.checkpoint.build_checkpoints import TINY, build_model, load, save
from tests.support.cases import run_each
from tests.weight_sync.worker import BUCKET_BYTES, DTYPES, new_engine

LORA = settings_of(4, 12.0, None, 0.0)
NUM_ROUNDS = 2


@torch.no_grad()
def number(model):
    """B away from its zeros; at one rank alone."""
    generator = torch.Generator().manual_seed(3)
    for name, param in model.named_parameters():
        if name.endswith("lora_b"):
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))


@torch.no_grad()
def change(model):
    for param in model.parameters():
        if param.requires_grad:
            param.mul_(1.01).add_(0.003)


def run(case):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_k2.host.cpu import cpu_host

    dist.init_process_group("gloo")
    with cpu_host():
        parallel_state.initialize_model_parallel(**case["layout"], expert_tensor_parallel_size=1)
        model_parallel_cuda_manual_seed(1)
        model = build_model(lora=LORA, **case["layout"])
        model.load_base(case["base"])
        if case["load"]:
            load([model], Path(case["load"]))
        else:
            number(model)
        if case["scale_twice"]:
            model.lora = dataclasses.replace(LORA, alpha=LORA.scale * LORA.alpha)
        asyncio.run(rounds(case, model))


async def rounds(case, model):
    from megatron_k2.checkpoint.hf.quantization import quantization_like
    from megatron_k2.weight_sync.push import push
    from megatron_k2.weight_sync.source import WeightSource

    fp8 = quantization_like(None) if case["dtype"] == "fp8" else None
    out, dtype = Path(case["out"]), DTYPES.get(case["dtype"], torch.bfloat16)
    source = WeightSource([model], TINY, dtype=dtype, fp8=fp8, bucket_bytes=BUCKET_BYTES)
    engine, weights = new_engine(dtype) if source.is_root else (None, None)
    saved = {"lora_rank": LORA.rank, "lora_alpha": LORA.alpha, "lora_base": case["base"]}
    for each in range(NUM_ROUNDS):
        if fp8 is None:
            found = await push(source, engine, f"v{each}")
            assert found.is_whole, found
            held = {} if weights is None else dict(weights.held)
        else:
            held = {name: tensor.clone() for name, tensor in source.tensors()}
        save([model], out / str(each), "rope", **saved)
        if source.is_root:
            torch.save(held, out / f"held_{each}.pt")
        change(model)
    if engine is not None:
        await engine.close()


if __name__ == "__main__":
    run_each(run, json.loads(Path(sys.argv[1]).read_text()))
