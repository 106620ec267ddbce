"""Block FP8 of rows: by C where there is a compiler (``blocks.c``), else by torch (``reference``).

The same bytes either way. With C a conversion does not import torch; a worker computes in its one
thread, and other threads run meanwhile.
"""

import ctypes
from collections import Counter

import numpy as np

from megatron_k2.checkpoint.block_fp8.layout import scale_shape
from megatron_k2.checkpoint.block_fp8.scales import ScaleClass, classify_scales
from megatron_k2.checkpoint.stream.rows import Dtype, Rows, rows_of
from megatron_k2.fp8 import native

_WIDE = (Dtype.BF16, Dtype.FP32)


def prepare() -> None:
    """What takes a moment, before workers are forked: compile, or import torch."""
    if native.library() is None:
        import megatron_k2.checkpoint.block_fp8.reference  # noqa: F401


def dequantized(codes: Rows, scales: Rows, dtype: Dtype) -> tuple[Rows, Counter[ScaleClass]]:
    """Weights [m, n] in ``dtype``, bf16 or fp32, and the blocks by how their scale was made.

    Args:
        codes: [m, n] e4m3; a row chunk must start at a multiple of 128 of its weight.
        scales: [ceil(m / 128), ceil(n / 128)] fp32.
        dtype: of the weights.

    Raises:
        ValueError: for scales of another shape.
    """
    m, n = codes.shape
    if scales.shape != scale_shape((m, n)):
        raise ValueError(f"scales {list(scales.shape)}, expected {list(scale_shape((m, n)))}")
    if (library := native.library()) is None:
        import torch

        from megatron_k2.checkpoint.block_fp8 import reference

        weight = reference.dequantize(
            codes.tensor(), scales.tensor(), getattr(torch, dtype.torch_name)
        )
        largest = reference.largest_codes(codes.tensor()).numpy()
        return rows_of(weight), classify_scales(largest, scales.bits)
    out, largest = np.empty((m, n), dtype.numpy), np.empty(scales.shape, np.uint8)
    held = _plain(codes.bits), _plain(scales.bits)
    library.dequantize_blocks(
        _at(out), _is_bf16(dtype), _at(held[0]), _at(held[1]), _at(largest), *_sizes(m, n)
    )
    return Rows(out, dtype), classify_scales(largest, scales.bits)


def requantized(
    weight: Rows, source_scales: Rows | None, *, power_of_two: bool = False
) -> tuple[Rows, np.ndarray, int]:
    """Codes, scales, and how many blocks have the source's; see ``reference.requantize``."""
    m, n = weight.shape
    if weight.dtype not in _WIDE:
        weight = weight.to(Dtype.FP32)
    if (library := native.library()) is None:
        from megatron_k2.checkpoint.block_fp8 import reference

        source = None if source_scales is None else source_scales.tensor()
        codes, scales, num_kept = reference.requantize(
            weight.tensor(), source, power_of_two=power_of_two
        )
        return rows_of(codes), scales.numpy(), num_kept
    made = np.empty((m, n), np.uint8), np.empty(scale_shape((m, n)), np.float32)
    held = _plain(weight.bits), None if source_scales is None else _plain(source_scales.bits)
    library.requantize_blocks.restype = ctypes.c_int64
    num_kept = library.requantize_blocks(
        _at(held[0]),
        _is_bf16(weight.dtype),
        _at(made[0]),
        _at(made[1]),
        _at(held[1]),
        ctypes.c_int(power_of_two),
        *_sizes(m, n),
    )
    return Rows(made[0], Dtype.E4M3), made[1], num_kept


def _plain(bits: np.ndarray) -> np.ndarray:
    """Contiguous and aligned, which a tensor in a mapped file need not be."""
    return np.require(bits, requirements=("C", "A"))


def _at(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def _is_bf16(dtype: Dtype) -> ctypes.c_int:
    return ctypes.c_int(dtype is Dtype.BF16)


def _sizes(m: int, n: int) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(m), ctypes.c_int64(n)
