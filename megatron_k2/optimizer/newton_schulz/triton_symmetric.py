"""Triton kernel for symmetric products: tiles of the upper triangle only, each written twice.

Serves both uses of Newton-Schulz: ``X Xᵀ``, and ``bA + cA²`` with its addend fused. Accumulates in
fp32 (IEEE products for fp32 inputs, not TF32). Imported only when asked for; needs Triton.

Checked here under Triton's CPU interpreter, in fp32: that shows indexing, masking and arithmetic.
No GPU was at hand, so nothing is claimed of its speed or of its bf16 path on one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_k2.optimizer.newton_schulz.cost import TRITON_TILE

INNER_TILE = 32


def symmetric_product(
    A: Tensor, B: Tensor, *, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """``alpha A B + beta add`` where the caller knows the result equals its transpose.

    Args:
        A: [n, m] or [k, n, m], fp32, bf16 or fp16, any strides.
        B: [m, n] or [k, m, n], same dtype; a transposed view costs no copy.
        add: symmetric [n, n] or [k, n, n], or None.
        beta: factor of ``add``.
        alpha: factor of the product.

    Returns:
        [n, n] or [k, n, n] in the inputs' dtype.
    """
    if A.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype {A.dtype}: the Triton kernel takes fp32, bf16 or fp16; use symmetric='blocks'"
        )
    a, b = (A[None], B[None]) if A.ndim == 2 else (A, B)
    batch, n, m = a.shape
    C = a.new_empty(batch, n, n)
    d = C if add is None else add.reshape(batch, n, n)
    num_tiles = triton.cdiv(n, TRITON_TILE)
    _upper_triangle_kernel[(num_tiles, num_tiles, batch)](
        a,
        b,
        d,
        C,
        n,
        m,
        alpha,
        beta,
        *a.stride(),
        *b.stride(),
        *d.stride(),
        *C.stride(),
        HAS_ADDEND=add is not None,
        TILE=TRITON_TILE,
        INNER=INNER_TILE,
    )
    return C[0] if A.ndim == 2 else C


@triton.jit
def _upper_triangle_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    d_ptr: tl.tensor,
    c_ptr: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    alpha: tl.tensor,
    beta: tl.tensor,
    a_batch: tl.tensor,
    a_row: tl.tensor,
    a_col: tl.tensor,
    b_batch: tl.tensor,
    b_row: tl.tensor,
    b_col: tl.tensor,
    d_batch: tl.tensor,
    d_row: tl.tensor,
    d_col: tl.tensor,
    c_batch: tl.tensor,
    c_row: tl.tensor,
    c_col: tl.tensor,
    HAS_ADDEND: tl.constexpr,
    TILE: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    i, j, k = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j < i:
        return
    rows = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    cols = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    inner = tl.arange(0, INNER)
    accumulator = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, m, INNER):
        at = start + inner
        a = tl.load(
            a_ptr + k * a_batch + rows[:, None] * a_row + at[None, :] * a_col,
            mask=(rows[:, None] < n) & (at[None, :] < m),
            other=0.0,
        )
        b = tl.load(
            b_ptr + k * b_batch + at[:, None] * b_row + cols[None, :] * b_col,
            mask=(at[:, None] < m) & (cols[None, :] < n),
            other=0.0,
        )
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
    accumulator *= alpha
    inside = (rows[:, None] < n) & (cols[None, :] < n)
    if HAS_ADDEND:
        d = tl.load(
            d_ptr + k * d_batch + rows[:, None] * d_row + cols[None, :] * d_col,
            mask=inside,
            other=0.0,
        )
        accumulator += beta * d.to(tl.float32)
    tile = accumulator.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + k * c_batch + rows[:, None] * c_row + cols[None, :] * c_col, tile, mask=inside)
    # The diagonal tile is whole already; writing it twice would race with itself.
    if j > i:
        mirrored = c_ptr + k * c_batch + cols[None, :] * c_row + rows[:, None] * c_col
        tl.store(mirrored, tile, mask=inside)
