"""Programs a second in the sandbox, what confinement costs in CPU, and what many alive weigh.

CPU seconds are those of this process and of everything it started, over a batch of programs whose
answers are checked; bare Python runs the same programs by ``subprocess``, with the same flags and
as ``python -c`` is called by hand. Rounds are interleaved. Alive are started interpreters, each in
a box of its own, that wait for their program; their memory is what the machine has less of.

    python benchmarks/sandbox.py [--backend NAME] [--seed 0] [--alive 1000]
"""

import argparse
import asyncio
import os
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from harness import machine_lock, print_inputs, print_result

from megatron_k2.sandbox.choose import backend_named, default_backend
from megatron_k2.sandbox.interpreter import as_input, default_python, waiting_python
from megatron_k2.sandbox.pool import Pool
from megatron_k2.sandbox.protocol import Backend, Limits
from megatron_k2.sandbox.watch import watch


def cpu_seconds() -> float:
    """Of this process and of all children that were waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    call()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def bare(flags: list[str], pairs: list[tuple[int, int]]) -> None:
    """Each program in a plain child, one after another."""
    for a, b in pairs:
        command = [default_python(), *flags, "-c", f"print({a} * {b})"]
        said = subprocess.run(command, capture_output=True, check=True).stdout
        assert int(said) == a * b


async def sandboxed(
    backend: Backend, pairs: list[tuple[int, int]], num_slots: int, num_warm: int
) -> None:
    """Each program in a box, ``num_slots`` at a time."""
    async with Pool(backend, num_slots=num_slots, num_warm=num_warm) as pool:
        found = await asyncio.gather(*(pool.run(f"print({a} * {b})") for a, b in pairs))
    assert [int(each.stdout) for each in found] == [a * b for a, b in pairs]


def available_bytes() -> int:
    """Memory that the machine has left."""
    rows = Path("/proc/meminfo").read_text().splitlines()
    return next(int(row.split()[1]) << 10 for row in rows if row.startswith("MemAvailable"))


async def alive(backend: Backend, number: int) -> tuple[float, float, int]:
    """GiB that ``number`` waiting interpreters take, seconds to start them, how many answer."""
    limits = Limits(wall_seconds=600)
    before, began = available_bytes(), time.perf_counter()
    boxes = [backend.open(limits) for _ in range(number)]
    started = [(box, box.start(waiting_python())) for box in boxes]
    seconds = time.perf_counter() - began
    await asyncio.sleep(3)
    taken = before - available_bytes()
    runs = [
        watch(process, limits, box.folder, as_input(f"print({n})"))
        for n, (box, process) in enumerate(started)
    ]
    found = await asyncio.gather(*runs)
    for box in boxes:
        await box.close()
    right = sum(result.stdout == b"%d\n" % n for n, result in enumerate(found))
    return taken / (1 << 30), seconds, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="default: the strongest that passes the suite")
    parser.add_argument("--programs", type=int, default=100, help="a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--alive", type=int, default=1000, help="0: not measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    chosen = options.backend
    backend = backend_named(chosen) if chosen else asyncio.run(default_backend(print))
    order = random.Random(options.seed)
    candidates: dict[str, Callable[[list[tuple[int, int]]], None]] = {
        "bare": lambda pairs: bare(["-I", "-S"], pairs),
        "bare_by_hand": lambda pairs: bare([], pairs),
        "cold": lambda pairs: asyncio.run(sandboxed(backend, pairs, options.slots, 0)),
        "warm": lambda pairs: asyncio.run(sandboxed(backend, pairs, options.slots, options.slots)),
    }
    with machine_lock():
        print_inputs(**{**vars(options), "backend": backend.name, "python": default_python()})
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
        for _ in range(options.rounds):
            for name in order.sample(list(candidates), len(candidates)):
                pairs = [
                    (order.randrange(10**6), order.randrange(10**6))
                    for _ in range(options.programs)
                ]
                samples[name].append(timed(lambda name=name, pairs=pairs: candidates[name](pairs)))
        wall, cpu = (
            {name: statistics.median(row[i] for row in rows) for name, rows in samples.items()}
            for i in (0, 1)
        )
        figures: dict[str, object] = {"backend": backend.name}
        figures |= {f"{name}_per_s": options.programs / wall[name] for name in ("cold", "warm")}
        figures |= {f"{name}_cpu_ms": 1e3 * cpu[name] / options.programs for name in candidates}
        figures["cpu_over_bare"] = cpu["cold"] / cpu["bare"]
        figures["cpu_over_bare_by_hand"] = cpu["cold"] / cpu["bare_by_hand"]
        if options.alive:
            gib, seconds, right = asyncio.run(alive(backend, options.alive))
            figures |= {"alive": right, "alive_gib": gib, "alive_start_s": seconds}
        print_result(**figures)


if __name__ == "__main__":
    main()
