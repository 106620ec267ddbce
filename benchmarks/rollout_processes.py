"""The part of ``rollout.py`` that asks what several processes bring.

The same requests, as many times the batch as there are processes, go through one embedded engine
in this process and through a pool with a batch of slots in each process. The gain is CPU seconds of
the one over those of the busiest process of the other, this one (which hands on) included: what the
wall clock shows where each has a core to itself. CPU seconds of all together say what it costs.
"""

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from megatron_k2.engine.local.core import STEP_TOKENS, Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.pool import PoolEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.local.worker import Share
from megatron_k2.engine.protocol import Engine, Request, SamplingParams


async def answers(engine: Engine, prompts: list[tuple[int, ...]], new: int) -> list[list[int]]:
    """Greedy answers of all prompts at once."""
    params = SamplingParams(temperature=0, max_tokens=new)

    async def one(name: str, prompt: tuple[int, ...]) -> list[int]:
        request = Request(name, prompt, params)
        return [t.id async for output in engine.generate(request) for t in output.tokens]

    return await asyncio.gather(*(one(str(i), p) for i, p in enumerate(prompts)))


def pool_of(
    core: Core, tensors: Iterable[tuple[str, Tensor]], count: int, batch: int
) -> PoolEngine:
    """Processes over the weights that ``tensors`` brings, in files that are gone afterwards."""
    preset, files = core.weights.preset, Path(tempfile.mkdtemp())
    try:
        weights = Weights(preset, torch.float32, torch.device("cpu"), folder=files)
        weights.load(tensors)
        share = Share(
            preset,
            torch.float32,
            (1, 1),
            files,
            batch,
            core.max_length,
            "0",
            STEP_TOKENS,
            False,
            None,
        )
        return PoolEngine(weights, share, count)
    finally:
        shutil.rmtree(files)


def of_processes(
    core: Core, tensors: Iterable[tuple[str, Tensor]], options: argparse.Namespace
) -> float:
    """How many times one process's work the busiest of several saves."""
    return asyncio.run(_measured(core, tensors, options))


async def _measured(
    core: Core, tensors: Iterable[tuple[str, Tensor]], options: argparse.Namespace
) -> float:
    generator = torch.Generator().manual_seed(options.seed)
    count, length = options.processes, 64
    vocab, shape = core.weights.preset.vocab_size, (count * options.batch, length)
    rounds: list[tuple[float, float, float]] = []
    pool, one = pool_of(core, tensors, count, options.batch), LocalEngine(core)
    for number in range(options.rounds + 1):
        drawn = torch.randint(4, vocab, shape, generator=generator).tolist()
        prompts = [tuple(row) for row in drawn]  # new ones: no row of an earlier round is of use
        begin = time.process_time()
        alone = await answers(one, prompts, options.new)
        single = time.process_time() - begin
        before, begin = await pool.cpu_seconds(), time.process_time()
        found = await answers(pool, prompts, options.new)
        handing = time.process_time() - begin
        each = [b - a for a, b in zip(before, await pool.cpu_seconds(), strict=True)]
        same = sum(a == b for a, b in zip(alone, found, strict=True))
        if number:  # the first warms
            rounds.append((single, max(*each, handing), sum(each) + handing))
    await pool.close()
    await one.close()
    single, busiest, everybody = (median(column) for column in zip(*rounds, strict=True))
    tokens = count * options.batch * options.new
    print(
        f"{count} processes, prompt {length}, {tokens:,} tokens: one process {single:.2f} CPU s, "
        f"the busiest of {count} {busiest:.2f} s: {single / busiest:.2f}x; all together "
        f"{everybody / single:.2f}x the CPU seconds; {same} of {len(prompts)} answers equal",
        flush=True,
    )
    return single / busiest
