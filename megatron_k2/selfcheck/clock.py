"""Seconds of a call, on a GPU by events, on a CPU by the wall; a machine's two ceilings."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS, WARM_UPS = 20, 3
SETTLED_SECONDS = 0.25
"""Repeats stop after so long, but for the first three."""
SQUARE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}


def seconds(call: Callable[[], Any], device: str) -> float:
    """Median seconds of ``call``, which the caller has seen to be right."""
    for _ in range(WARM_UPS if device == "cuda" else 1):
        call()
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < 3 or (
        len(found) < REPEATS and time.perf_counter() - started < SETTLED_SECONDS
    ):
        found.append(_once(call, device))
    return statistics.median(found)


def _once(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product of random numbers; zeros would be faster on a GPU."""
    size = SQUARE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def copy_rate(device: str) -> float:
    """Bytes a second, those read and those written, of a copy larger than any cache."""
    source = torch.randint(256, (COPY_BYTES[device],), dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: out.copy_(source), device)
