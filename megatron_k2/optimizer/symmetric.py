"""Matrix products whose result is known to be symmetric: compute one triangle, mirror the other.

Every product of Newton-Schulz but the last of a step is symmetric. Three ways to form one:

* ``none``: an ordinary GEMM. Bit parity with other implementations needs this one.
* ``blocks``: the upper triangle in four row blocks, by ordinary GEMMs, then mirrored: 62.5 % of the
  FLOPs.
* ``triton``: a kernel over tiles of the upper triangle which writes both (``triton_symmetric.py``).
"""

from typing import Literal

import torch
from torch import Tensor

SymmetricMethod = Literal["none", "blocks", "triton"]

NUM_ROW_BLOCKS = 4
MIN_BLOCKED_FLOPS = {torch.bfloat16: 1 << 29, torch.float16: 1 << 29}
"""A product of fewer FLOPs is formed whole: the copies cost more than is saved (one thread of an
AMD EPYC: bf16 0.92x at 512³, 1.15x at 512² x 1792; fp32 0.98x at 128² x 448, 1.19x at 256³)."""
MIN_BLOCKED_FLOPS_WIDE = 1 << 25
"""The same in fp32 and fp64."""
TRITON_TILE = 64
"""Rows and columns of one tile of the Triton kernel."""


def product(
    A: Tensor,
    B: Tensor,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    symmetric: SymmetricMethod = "none",
) -> Tensor:
    """``alpha A B + beta add``, fused where torch can.

    Args:
        A: [rows, inner] or [k, rows, inner].
        B: [inner, cols] or [k, inner, cols].
        add: of the result's shape, or None for no addend; symmetric itself unless ``symmetric`` is
            none.
        beta: factor of ``add``.
        alpha: factor of the product.
        symmetric: other than ``none``, the caller's word that the result equals its transpose.
    """
    if symmetric == "triton":
        from megatron_k2.optimizer.triton_symmetric import symmetric_product

        return symmetric_product(A, B, add=add, beta=beta, alpha=alpha)
    if symmetric == "blocks" and _is_worth_blocks(A.shape[-2], A.shape[-1], A.dtype):
        return _blocked_product(A, B, add, beta, alpha)
    if symmetric not in ("none", "blocks"):
        raise ValueError(f"symmetric={symmetric!r}: expected none, blocks or triton")
    return _gemm(A, B, add, beta, alpha)


def _is_worth_blocks(rows: int, inner: int, dtype: torch.dtype) -> bool:
    return 2 * rows * rows * inner >= MIN_BLOCKED_FLOPS.get(dtype, MIN_BLOCKED_FLOPS_WIDE)


def _gemm(
    A: Tensor, B: Tensor, add: Tensor | None, beta: float, alpha: float, out: Tensor | None = None
) -> Tensor:
    if add is None:
        result = torch.matmul(A, B, out=out)
        return result if alpha == 1.0 else result.mul_(alpha)
    fused = torch.addmm if A.ndim == 2 else torch.baddbmm
    return fused(add, A, B, beta=beta, alpha=alpha, out=out)


def _blocked_product(A: Tensor, B: Tensor, add: Tensor | None, beta: float, alpha: float) -> Tensor:
    rows = A.shape[-2]
    C = A.new_empty(*A.shape[:-1], rows)
    for start, end in row_blocks(rows, -(-rows // NUM_ROW_BLOCKS)):
        addend = None if add is None else add[..., start:end, start:]
        _gemm(
            A[..., start:end, :],
            B[..., :, start:],
            addend,
            beta,
            alpha,
            out=C[..., start:end, start:],
        )
        C[..., end:, start:end] = C[..., start:end, end:].mT
    return C


def row_blocks(rows: int, block: int) -> list[tuple[int, int]]:
    """[start, end) of consecutive blocks of ``block`` rows, the last one short."""
    return [(start, min(start + block, rows)) for start in range(0, rows, block)]


def num_computed_elements(
    rows: int, inner: int, symmetric: SymmetricMethod, dtype: torch.dtype
) -> int:
    """Elements of a symmetric [rows, rows] result of that inner size computed and not copied."""
    if symmetric == "none" or (symmetric == "blocks" and not _is_worth_blocks(rows, inner, dtype)):
        return rows * rows
    block = TRITON_TILE if symmetric == "triton" else -(-rows // NUM_ROW_BLOCKS)
    return sum((end - start) * (rows - start) for start, end in row_blocks(rows, block))
