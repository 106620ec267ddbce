"""Orthogonalisation of a matrix by Newton-Schulz iteration, the ``NewtonSchulz(M_t)`` of MuonClip.

Kimi K2 report (arXiv:2507.20534), Algorithm 1, calls it and leaves the iteration to Moonlight
(arXiv:2502.16982, section 2.1): ``X <- aX + bAX + cA²X`` with ``A = XXᵀ``, which drives every
singular value of ``X`` towards 1 and leaves the singular vectors alone. The result approximates
``UVᵀ`` of the SVD.

Two forms of the same polynomial:

* plain: as written above, on ``X [n, m]``;
* Gram: since every factor is a polynomial in ``R = XXᵀ``, iterate on ``[n, n]`` matrices only,
  accumulate ``Q`` with ``X_k = Q X_0``, and touch ``X`` when ``R`` is formed and when ``Q`` is
  applied (Gram Newton-Schulz, Dao-AILab). A restart applies ``Q`` and forms ``R`` afresh. It is
  needed because rounding leaves ``R`` with eigenvalues a little below zero, where the polynomials
  grow without bound: ``x <- x (a + bx + cx²)²`` takes -0.004, bf16's error, to -0.05, -0.65,
  -36.

No process group, no state, no host synchronisation: nothing here reads a tensor's value in Python.

Legend: ``n`` rows and ``m`` columns after transposing to ``n <= m``; ``k`` matrices in a batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_k2.optimizer.symmetric import SymmetricMethod, num_computed_elements, product

Form = Literal["auto", "plain", "gram"]
Normalization = Literal["amax", "frobenius_eps"]
Step = tuple[float, float, float]

FROBENIUS_EPS = 1e-7  # torch.optim.Muon's and Moonlight's
RESTART_EVERY = {torch.bfloat16: 2, torch.float16: 3}
"""Steps on one ``R`` in the Gram form by dtype, so that no set diverges (tested for bf16)."""
RESTART_EVERY_FP32 = 5


@dataclass(frozen=True)
class CoefficientSet:
    """One published choice of the polynomials ``aX + bX³ + cX⁵``, a step each."""

    name: str
    source: str
    per_step: tuple[Step, ...]
    """(a, b, c) in order of application."""
    default_steps: int
    """As many as its source runs."""
    extension: Literal["cycle", "repeat_last"]
    """What step ``len(per_step)`` and later use: the first again, or the last for ever."""

    def take(self, steps: int) -> tuple[Step, ...]:
        """The first ``steps`` polynomials; fewer than listed cuts the list."""
        if steps < 1:
            raise ValueError(f"steps={steps}: expected at least 1; {self.default_steps} is usual")
        last = len(self.per_step) - 1
        if self.extension == "cycle":
            return tuple(self.per_step[i % (last + 1)] for i in range(steps))
        return tuple(self.per_step[min(i, last)] for i in range(steps))


_JORDAN: Step = (3.4445, -4.7750, 2.0315)

COEFFICIENTS: dict[str, CoefficientSet] = {
    row.name: row
    for row in (
        CoefficientSet(
            name="jordan",
            source="Keller Jordan, Muon (2024); Moonlight, arXiv:2502.16982, section 2.1",
            per_step=(_JORDAN,),
            default_steps=5,
            extension="cycle",
        ),
        CoefficientSet(
            name="quintic",
            source="F. L. Cesista and others, muon-opt-coeffs (2025), by way of modded-nanogpt; "
            "Megatron-Core's default",
            per_step=(
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            default_steps=5,
            extension="cycle",
        ),
        CoefficientSet(
            name="polar_express",
            source="Polar Express, arXiv:2505.16932, its safety factor 1.01 folded into all but "
            "the last polynomial, to four digits as in Emerging-Optimizers",
            per_step=(
                (8.2051, -22.9019, 16.4607),
                (4.0664, -2.8612, 0.5184),
                (3.9096, -2.8234, 0.5250),
                (3.2856, -2.4153, 0.4853),
                (2.2779, -1.6198, 0.3985),
                (1.8726, -1.2307, 0.3585),
                (1.8564, -1.2132, 0.3568),
                (1.8750, -1.2500, 0.3750),
            ),
            default_steps=5,
            extension="repeat_last",
        ),
        CoefficientSet(
            name="deepseek_v4",
            source="DeepSeek-V4 report, section 2.4: eight fast steps, then two that pin the "
            "singular values at 1",
            per_step=(_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
            default_steps=10,
            extension="repeat_last",
        ),
    )
}

CPU_BATCH_BYTES = 1 << 20
"""A larger batch is worked through in parts on a CPU, so that a part's five steps stay in the
second-level cache: 202 matrices [64, 128] in fp32 47 ms as one batch, 32 ms in parts of 32."""


def orthogonalize(
    G: Tensor,
    *,
    coefficients: str = "jordan",
    steps: int | None = None,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
    symmetric: SymmetricMethod = "none",
    normalization: Normalization = "amax",
    restart_every: int | None = None,
) -> Tensor:
    """Approximate ``UVᵀ`` of each matrix of ``G = USVᵀ``.

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
        normalization: how the spectral norm is brought to at most 1 first.
            ``amax``: divide by the largest magnitude, then by the Frobenius norm, in at least fp32,
            and cast after; the result does not depend on the scale of ``G`` down to subnormal
            numbers.
            ``frobenius_eps``: cast to ``dtype``, divide by max(norm, 1e-7): torch.optim.Muon's
            order, for bit parity with it. Below that norm its result is no longer orthogonal: a
            gradient of norm 1e-9 moves the weights by half, one of 1e-20 not at all.
        restart_every: Gram form: steps between restarts; None takes ``RESTART_EVERY``. With 3 in
            bf16 five ``jordan`` steps save a seventh of the FLOPs and singular values reach 1.3.

    Returns:
        [..., rows, cols] in ``dtype``. A zero matrix gives zero, a rank-deficient one stays finite
        and keeps its rank up to rounding.
    """
    if G.ndim < 2:
        raise ValueError(f"G has shape {tuple(G.shape)}; expected a matrix [..., rows, cols]")
    dtype = dtype or G.dtype
    row = coefficient_set(coefficients)
    schedule = row.take(row.default_steps if steps is None else steps)
    if G.numel() == 0:
        return G.to(dtype)
    rows, cols = G.shape[-2:]
    fitting = max(1, CPU_BATCH_BYTES // (rows * cols * dtype.itemsize))
    if G.device.type == "cpu" and G.numel() > fitting * rows * cols:
        parts = [
            orthogonalize(
                part,
                coefficients=coefficients,
                steps=steps,
                form=form,
                dtype=dtype,
                symmetric=symmetric,
                normalization=normalization,
                restart_every=restart_every,
            )
            for part in G.flatten(0, -3).split(fitting)
        ]
        return torch.cat(parts).view(G.shape)
    X = G.mT if rows > cols else G
    X = _normalize(X, dtype, normalization)
    batch = X.shape[:-2]
    # One matrix goes as a matrix: CPU GEMM is a fifth faster than a batch of one.
    X = X.flatten(0, -3).squeeze(0) if batch else X
    restart_every = restart_every or RESTART_EVERY.get(dtype, RESTART_EVERY_FP32)
    if choose_form(rows, cols, len(schedule), form, symmetric, restart_every) == "gram":
        X = _iterate_gram(X, schedule, symmetric, restart_every)
    else:
        X = _iterate_plain(X, schedule, symmetric)
    X = X.reshape(*batch, *X.shape[-2:])
    return X.mT if rows > cols else X


def coefficient_set(name: str) -> CoefficientSet:
    """The row called ``name``.

    Raises:
        ValueError: naming the sets there are.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"coefficients={name!r}: expected one of {', '.join(COEFFICIENTS)}")
    return COEFFICIENTS[name]


def frobenius_norm(X: Tensor) -> Tensor:
    """‖X‖_F of each matrix, [...] in at least fp32. Squares do not underflow at any scale.

    Args:
        X: [..., rows, cols].
    """
    scaled, amax = _divide_by_amax(X)
    return torch.linalg.vector_norm(scaled, dim=(-2, -1)) * amax[..., 0, 0]


def _divide_by_amax(X: Tensor) -> tuple[Tensor, Tensor]:
    """A new tensor in at least fp32 whose largest magnitude is exactly 1 or 0; amax [..., 1, 1]."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    # Not vector_norm(ord=inf), which on CPU takes 20 times as long.
    amax = torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))
    return X / torch.where(amax == 0, 1, amax), amax


def _normalize(X: Tensor, dtype: torch.dtype, normalization: Normalization) -> Tensor:
    if normalization not in ("amax", "frobenius_eps"):
        raise ValueError(f"normalization={normalization!r}: expected amax or frobenius_eps")
    if normalization == "frobenius_eps":
        X = X.to(dtype)
        return X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=FROBENIUS_EPS)
    X, _ = _divide_by_amax(X)
    # The largest entry is now exactly 1, so the norm is at least 1 unless the matrix is zero.
    return X.div_(torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_(min=1)).to(dtype)


def _iterate_plain(X: Tensor, schedule: tuple[Step, ...], symmetric: SymmetricMethod) -> Tensor:
    for a, b, c in schedule:
        A = product(X, X.mT, symmetric=symmetric)
        B = product(A, A, add=A, beta=b, alpha=c, symmetric=symmetric)
        X = product(B, X, add=X, beta=a)
    return X


def _iterate_gram(
    X: Tensor, schedule: tuple[Step, ...], symmetric: SymmetricMethod, restart_every: int
) -> Tensor:
    """Segments of the schedule, each from a fresh ``R = XXᵀ`` and ended by one ``Q X``."""
    for start in range(0, len(schedule), restart_every):
        segment = schedule[start : start + restart_every]
        A = product(X, X.mT, symmetric=symmetric)
        Q: Tensor | None = None
        for i, (a, b, c) in enumerate(segment):
            B = product(A, A, add=A, beta=b, alpha=c, symmetric=symmetric)
            # The step is X <- (aI + B) X. Its factors commute: all are polynomials in the same R,
            # so their products are symmetric.
            if Q is None:
                Q = B.clone()
                Q.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                Q = product(B, Q, add=Q, beta=a, symmetric=symmetric)
            if i + 1 < len(segment):
                A = product(B, A, add=A, beta=a, symmetric=symmetric)
                A = product(A, B, add=A, beta=a, symmetric=symmetric)
        if Q is not None:
            X = product(Q, X)
    return X


def choose_form(
    rows: int,
    cols: int,
    steps: int,
    form: Form,
    symmetric: SymmetricMethod = "none",
    restart_every: int = RESTART_EVERY[torch.bfloat16],
) -> Literal["plain", "gram"]:
    """``form`` itself, or for ``auto`` the one that executes fewer FLOPs; plain on a tie."""
    if form not in ("auto", "plain", "gram"):
        raise ValueError(f"form={form!r}: expected auto, plain or gram")
    if form != "auto":
        return form
    plain = newton_schulz_flops(rows, cols, steps, "plain", symmetric)
    gram = newton_schulz_flops(rows, cols, steps, "gram", symmetric, restart_every)
    return "gram" if gram < plain else "plain"


def newton_schulz_flops(
    rows: int,
    cols: int,
    steps: int,
    form: Form = "auto",
    symmetric: SymmetricMethod = "none",
    restart_every: int = RESTART_EVERY[torch.bfloat16],
) -> int:
    """FLOPs ``orthogonalize`` executes on one matrix in matrix products (a multiply-add is two).

    In units of n³ with r = m/n and five steps: plain 20r + 10; Gram 12r + 22 restarting every two
    steps (bf16), 4r + 34 without a restart (fp32). Were symmetric products free of waste: 15r + 5,
    9r + 11, 3r + 17. What ``symmetric`` really computes is counted here, diagonal blocks in full.
    """
    if form == "auto":
        form = choose_form(rows, cols, steps, form, symmetric, restart_every)
    n, m = min(rows, cols), max(rows, cols)
    elements = num_computed_elements(n, symmetric)
    gram_matrix, square, apply = 2 * elements * m, 2 * elements * n, 2 * n * n * m
    if form == "plain":
        return steps * (gram_matrix + square + apply)
    total = 0
    for start in range(0, steps, restart_every):
        # per step: A², Q, and two for A; the first step's Q and the last step's A are not needed
        num_squares = 4 * min(restart_every, steps - start) - 3
        total += gram_matrix + apply + num_squares * square
    return total
