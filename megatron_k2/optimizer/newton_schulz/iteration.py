"""Orthogonalisation of a matrix by Newton-Schulz iteration, the ``NewtonSchulz(M_t)`` of MuonClip.

Kimi K2 report (arXiv:2507.20534), Algorithm 1, calls it and leaves the iteration to Moonlight
(arXiv:2502.16982, section 2.1): ``X <- aX + bAX + cA²X`` with ``A = XXᵀ``, which drives every
singular value of ``X`` towards 1 and leaves the singular vectors alone. The result approximates
``UVᵀ`` of the SVD.

Two forms of the same polynomial:

* plain: as written above, on ``X [n, m]``;
* Gram: since every factor is a polynomial in ``R = XXᵀ``, iterate on ``[n, n]`` matrices only,
  accumulate ``Q`` with ``X_k = Q X_0``, and touch ``X`` when ``R`` is formed and when ``Q`` is
  applied (Gram Newton-Schulz, Dao-AILab). A restart applies ``Q`` and forms ``R`` afresh; where
  they are needed is worked out in ``gram_restarts.py``.

No process group, no state, no host synchronisation: nothing here reads a tensor's value in Python.

Legend: ``n`` rows and ``m`` columns after transposing to ``n <= m``; ``k`` matrices in a batch.
"""

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from megatron_k2.optimizer.newton_schulz.coefficients import Step, coefficient_set
from megatron_k2.optimizer.newton_schulz.cost import (
    Form,
    SymmetricMethod,
    choose_form,
)
from megatron_k2.optimizer.newton_schulz.gram_restarts import restart_segments
from megatron_k2.optimizer.newton_schulz.symmetric import product

CPU_BATCH_BYTES = 2 << 20
"""Bytes of a batch that still runs from one core's cache, see ``batch_size``."""
FIRST_BLOCKED_ROWS = {torch.bfloat16: 1024, torch.float16: 1024}
"""Rows from which products go by blocks, see ``symmetric_method``. At 896 rows and r = 1.1 and 2.6,
on one thread of an AMD EPYC (busy), blocks make bf16 1.19x and 1.16x as fast for 1.32x and 1.42x
fewer FLOPs, fp32 1.24x and 1.32x."""


FIRST_TRITON_ROWS = 2048
"""Rows from which a GPU computes one triangle, see ``symmetric_method``: on an H200 five bf16 steps
of 8 experts [2048, 7168] take 6.09 ms in place of 7.38, of a [7168, 8192] 16.3 in place of 18.7; at
1536 rows and fewer, one matrix at a time, starting the kernel costs more than half a product."""
MEASURED_CAPABILITY = (9, 0)


@functools.cache
def has_measured_kernel() -> bool:
    """Whether the Triton kernel is there, on a GPU of the kind that ``docs/gpu.md`` measured."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() == MEASURED_CAPABILITY


def orthogonalize(
    G: Tensor,
    *,
    coefficients: str = "jordan",
    steps: int | None = None,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
    symmetric: SymmetricMethod = "none",
    segments: tuple[int, ...] | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """Approximate ``UVᵀ`` of each matrix of ``G = USVᵀ``.

    A matrix is divided by its Frobenius norm first, which is formed in fp64, and cast after; the
    result does not depend on the scale of ``G`` down to subnormal numbers.

    Args:
        G: [..., rows, cols], any floating dtype; leading dimensions are a batch. Not modified.
            Finite: a NaN or infinity makes its own matrix NaN, and only that one.
        coefficients: a key of ``COEFFICIENTS``. The report does not say; Moonlight uses ``jordan``.
        steps: polynomials applied; the set's own number if None (5 for ``jordan``, as in
            Moonlight).
        form: ``plain``, ``gram``, or ``auto``: whichever executes fewer FLOPs at this shape, Gram
            from cols/rows = 1.5 on.
        dtype: dtype of the iteration and of the result; ``G``'s if None. Moonlight: bf16.
        symmetric: how products known to be symmetric are formed, see ``symmetric.py``. Only with
            ``none`` is a batch bit-equal to its matrices one by one (seen on CPU).
        segments: Gram form: steps between restarts, such as (3, 2); None takes
            ``restart_segments``, which is safe in every dtype.
        norms: [...] fp32, filled with ‖G‖_F of each matrix, which is formed anyway.

    Returns:
        [..., rows, cols] in ``dtype``. A zero matrix gives zero, a rank-deficient one stays finite
        and keeps its rank up to rounding.
    """
    if G.ndim < 2:
        raise ValueError(f"G has shape {tuple(G.shape)}; expected a matrix [..., rows, cols]")
    dtype = dtype or G.dtype
    schedule = coefficient_set(coefficients).take(steps)
    segments = segments or restart_segments(schedule, dtype)
    if sum(segments) != len(schedule):
        raise ValueError(f"segments={segments}: expected {len(schedule)} steps in all")
    rows, cols = G.shape[-2:]
    iterate: Callable[[Tensor], tuple[Tensor, Tensor, float]]
    if choose_form(rows, cols, segments, form, symmetric, dtype) == "gram":
        iterate = partial(_iterate_gram, schedule=schedule, segments=segments, symmetric=symmetric)
    else:
        iterate = partial(_iterate_plain, schedule=schedule, symmetric=symmetric)
    if G.numel() == 0:
        return G.to(dtype)
    is_tall = rows > cols
    X, norm = _normalize(G.mT if is_tall else G, dtype)
    if norms is not None:
        norms.copy_(norm)
    # One matrix goes as a matrix: CPU GEMM is a fifth faster than a batch of one.
    Q, X, a = iterate(X.flatten(0, -3).squeeze(0) if X.ndim > 2 else X)
    # In G's own layout: turning the result afterwards costs a third of a product.
    left, right, addend = (X.mT, Q.mT, X.mT) if is_tall else (Q, X, X)
    return product(left, right, add=addend if a else None, beta=a).reshape(G.shape)


def batch_size(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """Matrices to give ``orthogonalize`` at once; None where more is always better.

    On a CPU as many as still run from the cache: on one thread of an AMD EPYC (busy), 202 matrices
    [64, 128] in fp32 take 71 ms as one batch, 40 to 42 ms in parts of 16 to 64; a [256, 896] in
    bf16 takes 3.4 ms in pairs and 3.2 in fours.
    """
    if device.type != "cpu":
        return None
    return max(1, CPU_BATCH_BYTES // (rows * cols * dtype.itemsize))


def symmetric_method(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    on_gpu: SymmetricMethod | None = None,
) -> SymmetricMethod:
    """How to form symmetric products of matrices that come ``batch_size`` at once.

    One triangle is computed only where a result does not depend on which matrices it was batched
    with: on a CPU by blocks, where the matrix is large and a batch of its own; on a GPU by the
    Triton kernel, each of whose programs works on one matrix. Elsewhere as ordinary products.

    Args:
        rows: of each matrix.
        cols: of each matrix.
        dtype: of the iteration.
        device: that executes it.
        on_gpu: ``triton`` or ``none`` for all (``--muonclip-triton-symmetric``), or ``None`` for
            the kernel where it was measured to be faster.
    """
    if device.type != "cpu":
        is_faster = (
            dtype == torch.bfloat16
            and min(rows, cols) >= FIRST_TRITON_ROWS
            and has_measured_kernel()
        )
        return on_gpu or ("triton" if is_faster else "none")
    is_large = min(rows, cols) >= FIRST_BLOCKED_ROWS.get(dtype, 0)
    return "blocks" if is_large and batch_size(rows, cols, dtype, device) == 1 else "none"


def _normalize(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(X of norm at most 1 but for rounding, what ‖X‖_F was [...]), whatever the scale of X.

    torch.optim.Muon and Moonlight cast first and divide by max(‖X‖_F, 1e-7). Below that norm their
    result is no longer orthogonal: a gradient of norm 1e-9 moves the weights by half, one of 1e-20
    not at all.
    """
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    # Divided before it is rounded, in no smaller range than bf16's and fp32's. The smallest
    # subnormal beside the norm keeps a norm near it from being rounded down. Zero stays zero, also
    # where subnormals count as such (GPUs, the CPU host).
    X = X.to(torch.promote_types(torch.promote_types(X.dtype, dtype), torch.bfloat16))
    info = torch.finfo(X.dtype)
    divisor = (norm + info.tiny * info.eps).to(X.dtype)
    return (X / torch.where(divisor == 0, 1, divisor)).to(dtype), norm[..., 0, 0]


def _iterate_plain(
    X: Tensor, schedule: tuple[Step, ...], symmetric: SymmetricMethod
) -> tuple[Tensor, Tensor, float]:
    """(B, X, a) of the last step ``X <- aX + BX``, which is left to the caller."""
    for number, (a, b, c) in enumerate(schedule, start=1):
        A = product(X, X.mT, symmetric=symmetric)
        B = product(A, A, add=A, beta=b, alpha=c, symmetric=symmetric)
        if number == len(schedule):
            return B, X, a
        X = product(B, X, add=X, beta=a)
    raise AssertionError("a schedule has at least one step")


def _iterate_gram(
    X: Tensor, schedule: tuple[Step, ...], segments: tuple[int, ...], symmetric: SymmetricMethod
) -> tuple[Tensor, Tensor, float]:
    """Segments of the schedule, each from a fresh ``R = XXᵀ`` and ended by one ``Q X``.

    Returns:
        (Q, X, 0) of the last one, whose product is left to the caller.
    """
    remaining = iter(schedule)
    for number, length in enumerate(segments, start=1):
        R = product(X, X.mT, symmetric=symmetric)
        if number == 1:
            raise_diagonal(R)
        Q = _accumulated(R, tuple(islice(remaining, length)), symmetric)
        if number == len(segments):
            return Q, X, 0.0
        X = product(Q, X)
    raise AssertionError("there is at least one segment")


def raise_diagonal(R: Tensor) -> None:
    """``R_ii <- R_ii (1 + eps)`` in place: at least one unit in the last place.

    Rounding moves ``R_ij`` by at most eps/2 of ``sqrt(R_ii R_jj)``, so that with a diagonal larger
    by eps any two rows stay positive definite. Zero rows stay zero.
    """
    R.diagonal(dim1=-2, dim2=-1).mul_(1 + torch.finfo(R.dtype).eps)


def _accumulated(R: Tensor, segment: tuple[Step, ...], symmetric: SymmetricMethod) -> Tensor:
    """``Q`` of a segment's steps from ``R``, each ``X <- (aI + B) X`` with ``B = bR + cR²``.

    All factors are polynomials in the same ``R``: they commute, and their products are symmetric.
    """
    Q: Tensor | None = None
    for i, (a, b, c) in enumerate(segment):
        B = product(R, R, add=R, beta=b, alpha=c, symmetric=symmetric)
        if i + 1 < len(segment):
            R = product(B, R, add=R, beta=a, symmetric=symmetric)
            R = product(R, B, add=R, beta=a, symmetric=symmetric)
        if Q is None:
            Q = B
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = product(B, Q, add=Q, beta=a, symmetric=symmetric)
    assert Q is not None
    return Q
