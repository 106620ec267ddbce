"""Matrix products whose result is known to be symmetric: compute one triangle, mirror the other.

Every product of Newton-Schulz but the last of a step is symmetric. Three ways to form one:

* ``none``: an ordinary GEMM. Bit parity with other implementations needs this one.
* ``blocks``: the upper triangle in four row blocks, by ordinary GEMMs, then mirrored: 62.5 % of the
  FLOPs.
* ``triton``: a kernel over tiles of the upper triangle which writes both (``triton_symmetric.py``).
"""

import torch
from torch import Tensor

from megatron_k2.optimizer.newton_schulz.cost import (
    NUM_ROW_BLOCKS,
    SymmetricMethod,
    is_worth_blocks,
    row_blocks,
)


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
        from megatron_k2.optimizer.newton_schulz.triton_symmetric import symmetric_product

        return symmetric_product(A, B, add=add, beta=beta, alpha=alpha)
    if symmetric == "blocks" and is_worth_blocks(A.shape[-2], A.shape[-1], A.dtype):
        return _blocked_product(A, B, add, beta, alpha)
    if symmetric not in ("none", "blocks"):
        raise ValueError(f"symmetric={symmetric!r}: expected none, blocks or triton")
    return _gemm(A, B, add, beta, alpha)


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
