"""What every benchmark here shares: a lock, paired rounds, medians, one result line.

A benchmark prints its inputs and the load average, measures its candidates in interleaved rounds
(so that a noisy minute falls on all of them), states the ceiling it compares with, and ends in
``RESULT k=v ...``.
"""

import contextlib
import fcntl
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOCK_PATH = Path(tempfile.gettempdir()) / "megatron_k2-bench.lock"


@dataclass(frozen=True)
class Timing:
    """Medians over rounds of one candidate."""

    wall_seconds: float
    cpu_seconds: float
    """Of this process, all threads: what remains meaningful when others use the cores."""
    spread: float
    """(Slowest − fastest) / median of the CPU times."""


@contextlib.contextmanager
def machine_lock() -> Iterator[None]:
    """Hold the machine-wide benchmark lock; waits for whoever has it."""
    with LOCK_PATH.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another benchmark to release {LOCK_PATH.name}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def print_inputs(**inputs: object) -> None:
    """The inputs and the machine's state, before anything is measured."""
    print("inputs: " + " ".join(f"{name}={value}" for name, value in inputs.items()))
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"machine: cores={os.cpu_count()} load_average={load}", flush=True)


def paired_medians(
    candidates: dict[str, Callable[[], object]], rounds: int, seed: int
) -> dict[str, Timing]:
    """Every candidate once per round in random order, after one unmeasured call each."""
    order = random.Random(seed)
    for call in candidates.values():
        call()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            wall, cpu = time.perf_counter(), time.process_time()
            candidates[name]()
            samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: summarize(values) for name, values in samples.items()}


def summarize(values: list[tuple[float, float]]) -> Timing:
    """Medians of (wall, CPU) seconds, a pair a call."""
    walls, cpus = [wall for wall, _ in values], [cpu for _, cpu in values]
    median = statistics.median(cpus)
    return Timing(statistics.median(walls), median, (max(cpus) - min(cpus)) / median)


def print_result(**figures: object) -> None:
    """The last line of a benchmark."""
    print("RESULT " + " ".join(f"{name}={_show(value)}" for name, value in figures.items()))


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
