"""Triton kernels for ``tiles``: one read and one write a matrix, in either direction.

Their bytes equal ``tiles.quantize_tiles``'s, under Triton's CPU interpreter and on an H200, where
they move 0.7 of a copy's bytes a second (``docs/gpu.md``). E4M3 needs compute capability 8.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_k2.fp8.tiles import AMAX_FLOOR, E4M3, E4M3_MAX, TILE, num_tiles

ROWS = 32
"""Rows of one program: 32 tiles, 8 KiB of bf16."""


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise as ``tiles.quantize_tiles`` does, by Triton; ``x`` [m, k] with any row stride."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=E4M3, device=x.device)
    scales = torch.empty(m, num_tiles(k), dtype=torch.float32, device=x.device)
    if not m:
        return codes, scales
    _quantize[(triton.cdiv(m, ROWS), num_tiles(k))](
        x if x.stride(1) == 1 else x.contiguous(),
        codes,
        scales,
        m,
        k,
        x.stride(0) if x.stride(1) == 1 else k,
        MAX=E4M3_MAX,
        FLOOR=AMAX_FLOOR,
        ROWS=ROWS,
        TILE=TILE,
    )
    return codes, scales


def dequantize_tiles(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Read back as ``tiles.dequantize_tiles`` does; ``codes`` and ``scales`` are contiguous."""
    m, k = codes.shape
    out = torch.empty(m, k, dtype=dtype, device=codes.device)
    if not m:
        return out
    _dequantize[(triton.cdiv(m, ROWS), num_tiles(k))](
        codes, scales, out, m, k, ROWS=ROWS, TILE=TILE
    )
    return out


@triton.jit
def _largest(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize(
    x_ptr: tl.tensor,
    code_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    x_row: tl.tensor,
    MAX: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = tl.program_id(1)
    cols = tile * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < m) & (cols[None, :] < k)
    x = tl.load(x_ptr + rows[:, None] * x_row + cols[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    amax = _largest(tl.reduce(tl.abs(x), 1, _largest), FLOOR)
    # div_rn: the plain quotient is approximate on a GPU, and the bytes must not depend on it.
    code = x * tl.div_rn(tl.full((ROWS,), MAX, tl.float32), amax)[:, None]
    tl.store(
        code_ptr + rows[:, None] * k + cols[None, :],
        code.to(code_ptr.dtype.element_ty),
        mask=inside,
    )
    scale = tl.div_rn(amax, tl.full((ROWS,), MAX, tl.float32))
    tl.store(scale_ptr + rows * tl.cdiv(k, TILE) + tile, scale, mask=rows < m)


@triton.jit
def _dequantize(
    code_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = tl.program_id(1)
    cols = tile * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < m) & (cols[None, :] < k)
    at = rows[:, None] * k + cols[None, :]
    scale = tl.load(scale_ptr + rows * tl.cdiv(k, TILE) + tile, mask=rows < m, other=0.0)
    value = tl.load(code_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)
