"""Triton kernel for symmetric products: tiles of the upper triangle only, each written twice.

Serves both uses of Newton-Schulz: ``X Xᵀ``, and ``bA + cA²`` with its addend fused. Accumulates in
fp32 (IEEE products for fp32 inputs, not TF32). Imported only when asked for; needs Triton.

Under Triton's CPU interpreter fp32 shows indexing, masking and arithmetic; bf16 is shown by the
``gpu`` tests. Tiles were chosen on an H200 among six, see ``docs/gpu.md``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_k2.optimizer.newton_schulz.cost import triton_tile

INNER_TILE = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
"""Dtype -> columns of ``A`` that a program multiplies at once; fp32 has no tensor cores."""
WARPS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}
STAGES = 3


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
    if A.dtype not in INNER_TILE:
        raise ValueError(
            f"dtype {A.dtype}: the Triton kernel takes fp32, bf16 or fp16; use symmetric='blocks'"
        )
    a, b = (A[None], B[None]) if A.ndim == 2 else (A, B)
    batch, n, m = a.shape
    C = a.new_empty(batch, n, n)
    d = C if add is None else add.reshape(batch, n, n)
    tile, inner = triton_tile(A.dtype), INNER_TILE[A.dtype]
    num_tiles = triton.cdiv(n, tile)
    _upper_triangle_kernel[(num_tiles * (num_tiles + 1) // 2, batch)](
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
        IS_EVEN=m % inner == 0,
        TILE=tile,
        INNER=inner,
        num_warps=WARPS[A.dtype],
        num_stages=STAGES,
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
    IS_EVEN: tl.constexpr,
    TILE: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    t, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # The triangle column by column: t = j (j + 1) / 2 + i with i <= j. The root is only near.
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    i = t - j * (j + 1) // 2
    rows = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    cols = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    inner = tl.arange(0, INNER)
    # Rows beyond the last read others' values, which are not stored: no mask in the loop.
    a_at = a_ptr + k * a_batch + (rows % n)[:, None] * a_row + inner[None, :] * a_col
    b_at = b_ptr + k * b_batch + inner[:, None] * b_row + (cols % n)[None, :] * b_col
    accumulator = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, m, INNER):
        if IS_EVEN:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            a = tl.load(a_at, mask=inner[None, :] < m - start, other=0.0)
            b = tl.load(b_at, mask=inner[:, None] < m - start, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
        a_at += INNER * a_col
        b_at += INNER * b_row
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
        mirrored = c_ptr + k * c_batch + cols[:, None] * c_row + rows[None, :] * c_col
        inside = (cols[:, None] < n) & (rows[None, :] < n)
        tl.store(mirrored, tl.trans(tile), mask=inside)
