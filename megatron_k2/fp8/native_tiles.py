"""``tiles`` through a few dozen lines of C, for a CPU: the same bytes, many times as fast as eager.

Eager torch makes a pass over memory for each operation, and Megatron's CPU host turns torch.compile
off. Without a compiler (``native``) ``tiles`` does the work. One thread. The sign of a NaN alone is
not promised: of a product of two, IEEE 754 leaves it to the processor.
"""

import ctypes

import torch
from torch import Tensor

from megatron_k2.fp8 import native, tiles
from megatron_k2.fp8.tiles import E4M3, num_tiles

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def is_available(dtype: torch.dtype) -> bool:
    """Whether matrices of ``dtype`` are quantised here, or by ``tiles``."""
    return dtype in SUFFIXES and native.library() is not None


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise as ``tiles.quantize_tiles`` does, by C where it can be: the same bytes."""
    if not is_available(x.dtype):
        return tiles.quantize_tiles(x)
    m, k = x.shape
    codes = torch.empty(m, k, dtype=E4M3)
    scales = torch.empty(m, num_tiles(k), dtype=torch.float32)
    _call(f"quantize_{SUFFIXES[x.dtype]}", x.contiguous(), codes, scales)
    return codes, scales


def dequantize_tiles(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Read back as ``tiles.dequantize_tiles`` does, by C where it can be: the same bytes."""
    if not is_available(dtype) or tuple(scales.shape) != (len(codes), num_tiles(codes.shape[1])):
        return tiles.dequantize_tiles(codes, scales, dtype)
    out = torch.empty(codes.shape, dtype=dtype)
    _call(f"dequantize_{SUFFIXES[dtype]}", out, codes.contiguous(), scales.contiguous())
    return out


def _call(name: str, wide: Tensor, codes: Tensor, scales: Tensor) -> None:
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (wide, codes, scales)]
    sizes = [ctypes.c_int64(size) for size in codes.shape]
    getattr(native.library(), name)(*pointers, *sizes)
