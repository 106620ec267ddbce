"""The part of ``rollout.py`` that asks what several processes bring.

The same requests, as many times the batch as there are processes, go through one embedded engine
in this process and through a pool with a batch of slots in each process. The gain is CPU seconds of
the one over those of the busiest process of the other, this one (which hands on) included: what the
wall clock shows where each has a core to itself. CPU seconds of all together say what it costs.
The ceiling is the same work in processes that have nothing to do with each other: cores that share
caches or memory are slower together than alone.
"""

import argparse
import asyncio
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_k2.engine.local import offline
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.pool import PoolEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.local.worker import Share, core_over
from megatron_k2.engine.protocol import Engine, Request, SamplingParams

type Prompts = list[tuple[int, ...]]


async def answers(engine: Engine, prompts: Prompts, new: int) -> list[list[int]]:
    """Greedy answers of all prompts at once."""
    params = SamplingParams(temperature=0, max_tokens=new)

    async def one(name: str, prompt: tuple[int, ...]) -> list[int]:
        request = Request(name, prompt, params)
        return [t.id async for output in engine.generate(request) for t in output.tokens]

    return await asyncio.gather(*(one(str(i), p) for i, p in enumerate(prompts)))


@contextmanager
def in_files(
    core: Core, tensors: Iterable[tuple[str, Tensor]], batch: int
) -> Iterator[tuple[Weights, Share, Path]]:
    """The weights that ``tensors`` brings, in files that are gone afterwards."""
    preset, files = core.weights.preset, Path(tempfile.mkdtemp())
    try:
        share = Share(preset, torch.float32, batch, core.max_length, "0")
        weights = share.weights(files)
        weights.load(tensors)
        yield weights, share, files
    finally:
        shutil.rmtree(files)


def work_apart(
    share: Share, folder: Path, rounds: list[Prompts], new: int, at_once: Any, told: Any
) -> None:
    """A process that answers by itself: nothing comes in or goes out but CPU seconds."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    core, params = core_over(share, folder), SamplingParams(temperature=0, max_tokens=new)
    seconds = []
    for prompts in rounds:
        at_once.wait()
        begin = time.process_time()
        offline.answers(core, prompts, params)
        seconds.append(time.process_time() - begin)
    told.put(seconds)


def seconds_apart(share: Share, folder: Path, rounds: list[list[Prompts]], new: int) -> list[float]:
    """CPU seconds of the busiest of processes that have nothing to do with each other, a round."""
    context = multiprocessing.get_context("spawn")
    at_once, told = context.Barrier(len(rounds)), context.Queue()
    processes = [
        context.Process(target=work_apart, args=(share, folder, own, new, at_once, told))
        for own in rounds
    ]
    for process in processes:
        process.start()
    found = [told.get() for _ in processes]
    for process in processes:
        process.join()
    return [max(column) for column in zip(*found, strict=True)]


def of_processes(
    core: Core, tensors: Iterable[tuple[str, Tensor]], options: argparse.Namespace
) -> float:
    """How many times one process's work the busiest of several saves."""
    return asyncio.run(_measured(core, tensors, options))


async def _measured(
    core: Core, tensors: Iterable[tuple[str, Tensor]], options: argparse.Namespace
) -> float:
    generator = torch.Generator().manual_seed(options.seed)
    count, batch, length = options.processes, options.batch, 64
    vocab, shape = core.weights.preset.vocab_size, (options.rounds + 1, count * batch, length)
    drawn = torch.randint(4, vocab, shape, generator=generator).tolist()
    every = [[tuple(row) for row in rows] for rows in drawn]  # new prompts a round: none shared
    rounds: list[tuple[float, float, float]] = []
    with in_files(core, tensors, batch) as (weights, share, files):
        pool, one = PoolEngine(weights, share, files, count), LocalEngine(core)
        own = [[rows[i * batch : (i + 1) * batch] for rows in every] for i in range(count)]
        apart = median((await asyncio.to_thread(seconds_apart, share, files, own, options.new))[1:])
    for number, prompts in enumerate(every):
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
    tokens = count * batch * options.new
    print(
        f"{count} processes, prompt {length}, {tokens:,} tokens: one process {single:.2f} CPU s, "
        f"the busiest of {count} {busiest:.2f} s: {single / busiest:.2f}x; all together "
        f"{everybody / single:.2f}x the CPU seconds; {same} of {len(prompts)} answers equal; "
        f"ceiling, processes that hand nothing on: {apart:.2f} s each, {single / apart:.2f}x",
        flush=True,
    )
    return single / busiest
