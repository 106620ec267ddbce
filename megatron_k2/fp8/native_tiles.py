"""``tiles`` through a few dozen lines of C, for a CPU: the same bytes, many times as fast as eager.

Eager torch makes a pass over memory for each operation, and Megatron's CPU host turns torch.compile
off. ``tiles.c`` is compiled once a machine, by the C compiler that the installation needs anyway,
into the user's cache; without a compiler ``tiles`` does the work. One thread.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_k2.fp8 import tiles
from megatron_k2.fp8.tiles import E4M3, num_tiles

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("tiles.c")
# No contraction: a fused multiply-add would round once where torch rounds twice. No traps: else a
# number that is then not chosen must not be computed, and a loop with a choice stays scalar.
FLAGS = "-O3 -march=native -ffp-contract=off -fno-trapping-math -shared -fPIC".split()
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@functools.cache
def _library() -> Any:
    """The compiled functions, or None where they cannot be had."""
    try:
        path = _cache() / f"tiles-{_fingerprint()}.so"
        if not path.exists():
            _compile(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("FP8 tiles by torch operations: tiles.c cannot be compiled here (%s)", error)
        return None


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "megatron_k2"


def _fingerprint() -> str:
    """Of the source, the flags and the processor: ``-march=native`` is for one kind of it."""
    found = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = {line for line in lines if line.startswith(("flags", "Features"))}
        found.update("".join(sorted(features)).encode())
    return found.hexdigest()[:16]


def _compile(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [os.environ.get("CC", "cc"), *FLAGS, str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        built.rename(path)  # whole, or not there: several ranks may do this at once


def is_available(dtype: torch.dtype) -> bool:
    """Whether matrices of ``dtype`` are quantised here, or by ``tiles``."""
    return dtype in SUFFIXES and _library() is not None


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """As ``tiles.quantize_tiles``."""
    if not is_available(x.dtype):
        return tiles.quantize_tiles(x)
    m, k = x.shape
    codes = torch.empty(m, k, dtype=E4M3)
    scales = torch.empty(m, num_tiles(k), dtype=torch.float32)
    _call(f"quantize_{SUFFIXES[x.dtype]}", x.contiguous(), codes, scales)
    return codes, scales


def dequantize_tiles(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``tiles.dequantize_tiles``."""
    if not is_available(dtype) or tuple(scales.shape) != (len(codes), num_tiles(codes.shape[1])):
        return tiles.dequantize_tiles(codes, scales, dtype)
    out = torch.empty(codes.shape, dtype=dtype)
    _call(f"dequantize_{SUFFIXES[dtype]}", out, codes.contiguous(), scales.contiguous())
    return out


def _call(name: str, wide: Tensor, codes: Tensor, scales: Tensor) -> None:
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (wide, codes, scales)]
    sizes = [ctypes.c_int64(size) for size in codes.shape]
    getattr(_library(), name)(*pointers, *sizes)
