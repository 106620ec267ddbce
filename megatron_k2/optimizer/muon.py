"""Muon on one matrix or a batch of them, on one device: the first half of MuonClip.

Kimi K2 report (arXiv:2507.20534), Algorithm 1, for a matrix W [n, m] with gradient G:

    M_t = μ M_{t-1} + G_t
    O_t = NewtonSchulz(M_t) · sqrt(max(n, m)) · 0.2
    W_t = W_{t-1} − η (O_t + λ W_{t-1})

The report states λ = 0.1 and the factor 0.2; μ = 0.95 and Nesterov's ``G_t + μ M_t`` in place of
``M_t`` are Moonlight's (arXiv:2502.16982, section 2.2 and its first footnote). Learning rate and
weight decay are those of AdamW for the rest of the model, which is what matching the update's RMS
to 0.2 is for.

Elementwise functions take any shape, flat ZeRO shards included; those that name [..., rows, cols]
need whole matrices. Which parameter is a Muon matrix, and who owns it, is decided elsewhere.
"""

import math

import torch
from torch import Tensor

from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize

RMS_MATCH_FACTOR = 0.2
"""K2 report, Algorithm 1; AdamW's usual update RMS is 0.2 to 0.4 (Moonlight, section 2.2)."""
IDLE_FLOOR = 0.1
"""Part of its recent peak below which a momentum's norm counts as faded; ours (``idle_factor``)."""
PEAK_DECAY = 0.99
"""What the recent peak keeps of itself at each step; ours (``idle_factor``). Half-life 69 steps,
against 14 of the momentum."""


def update_momentum(momentum: Tensor, grad: Tensor, mu: float, nesterov: bool) -> Tensor:
    """``M <- μM + G`` in place; what is to be orthogonalised.

    Args:
        momentum: M, any shape, fp32 usually.
        grad: G, same shape, already reduced over micro-batches and data-parallel ranks.
        mu: μ.
        nesterov: return ``G + μM`` with the new M, a new tensor; otherwise M itself, not a copy.
    """
    momentum.mul_(mu).add_(grad)
    return torch.add(grad, momentum, alpha=mu) if nesterov else momentum


def update_momenta(
    momenta: list[Tensor],
    grads: list[Tensor],
    mu: float,
    nesterov: bool,
    grad_factor: float | Tensor | None = None,
) -> list[Tensor]:
    """``update_momentum`` of many tensors, in three operations in all rather than three each.

    Args:
        momenta: M of each.
        grads: G of each.
        mu: see ``update_momentum``.
        nesterov: see ``update_momentum``.
        grad_factor: of a clip, a number or a scalar on the device; ``grads`` are scaled by it in
            place. None: as they are.
    """
    if grad_factor is not None:
        torch._foreach_mul_(grads, grad_factor)
    torch._foreach_mul_(momenta, mu)
    torch._foreach_add_(momenta, grads)
    return list(torch._foreach_add(grads, momenta, alpha=mu)) if nesterov else momenta


def rms_match_scale(rows: int, cols: int, factor: float = RMS_MATCH_FACTOR) -> float:
    """``factor · sqrt(max(rows, cols))``, which gives an orthogonal update the RMS ``factor``.

    ``UVᵀ`` of full rank has min(rows, cols) singular values of 1, so its RMS is
    sqrt(min / (rows · cols)) = 1 / sqrt(max) (Moonlight, lemma 1).
    """
    return factor * math.sqrt(max(rows, cols))


def apply_update(
    weight: Tensor, update: Tensor, lr: float, weight_decay: float, scale: float = 1.0
) -> None:
    """``W <- W (1 − ηλ) − η · scale · update`` in place; decay by the plain η, not the scaled one.

    Args:
        weight: W, any shape; the fp32 master where there is one.
        update: same shape; orthogonalised.
        lr: η.
        weight_decay: λ, decoupled. The report: 0.1.
        scale: ``rms_match_scale`` of the whole matrix, also when ``weight`` is a shard of it.
    """
    weight.mul_(1 - lr * weight_decay)
    weight.add_(update, alpha=-(lr * scale))


def apply_updates(
    weights: list[Tensor],
    updates: list[Tensor],
    lr: float,
    weight_decay: float,
    scale: float = 1.0,
) -> None:
    """``apply_update`` of many tensors that share η, λ and scale, in two operations in all."""
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, updates, alpha=-(lr * scale))


def idle_factor(
    norm: Tensor, peak_norm: Tensor, floor: float = IDLE_FLOOR, peak_decay: float = PEAK_DECAY
) -> Tensor:
    """Factor in [0, 1] on the update of a matrix whose momentum has faded, 1 exactly for others.

    Our choice; the report is silent. Orthogonalisation forgets the length of its input, so an
    expert that gets no token goes on at full step in a direction that nothing new supports. Not
    even underflow ends it: 0.95 times ten subnormal units rounds to ten. We compare the norm of
    what is orthogonalised with a slowly decaying peak of itself,

        P_t = max(decay · P_{t-1}, ‖U_t‖),        factor_t = min(1, ‖U_t‖ / (floor · P_t)).

    A matrix whose norm stays within ``1 / floor`` of its recent peak gets 1 and so keeps its bits.
    An idle one has ‖U_t‖ / P_t = (μ / decay)^t: it goes about ln(1/floor) / ln(decay/μ) steps at
    full length and then fades geometrically, under 81 full steps in all at the defaults, under 42
    with ``floor=0.5``. A woken expert is back at 1 with its first gradient of usual size. A peak
    and not a mean of squares: no square to underflow, no bias to correct at the start, and the
    result does not depend on the loss scale.

    Args:
        norm: ‖U‖_F of each matrix, [...], of the whole matrix, not a shard; ``orthogonalize`` forms
            it.
        peak_norm: P, optimizer state of the same shape, fp32, zero at first; updated in place.
        floor: 0 disables: ones, ``peak_norm`` untouched.
        peak_decay: above μ, or fading momentum would never be noticed.

    Returns:
        [...], of ``norm``'s dtype. A norm below the smallest normal number gets 0: it is stuck
        there, while the peak would in time decay to it.
    """
    if floor == 0:
        return torch.ones_like(norm)
    torch.maximum(peak_norm * peak_decay, norm, out=peak_norm)
    factor = (norm / (floor * peak_norm)).clamp_(max=1)
    return torch.where(norm < torch.finfo(norm.dtype).tiny, 0, factor)


def muon_step(
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.1,
    mu: float = 0.95,
    nesterov: bool = True,
    coefficients: str = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    peak_norm: Tensor | None = None,
    idle_floor: float = IDLE_FLOOR,
) -> None:
    """One step of Algorithm 1's Muon part on ``weight`` [..., rows, cols], in place.

    The single-device composition of this module's functions: what the distributed optimizer must
    equal.

    Args:
        weight: W.
        grad: G.
        momentum: M, updated.
        lr: η, peak or scheduled.
        weight_decay: λ.
        mu: μ.
        nesterov: see ``update_momentum``.
        coefficients: see ``orthogonalize``.
        steps: see ``orthogonalize``.
        dtype: of the iteration; bf16 as Moonlight.
        peak_norm: state of ``idle_factor`` [...]; None leaves idle matrices alone, as the report
            does.
        idle_floor: see ``idle_factor``.
    """
    direction = update_momentum(momentum, grad, mu, nesterov)
    norms = direction.new_empty(direction.shape[:-2], dtype=torch.float32)
    update = orthogonalize(
        direction, coefficients=coefficients, steps=steps, dtype=dtype, norms=norms
    )
    if peak_norm is not None and idle_floor > 0:
        factor = idle_factor(norms, peak_norm, idle_floor)
        update = update * factor[..., None, None].to(update.dtype)
    rows, cols = weight.shape[-2:]
    apply_update(weight, update, lr, weight_decay, rms_match_scale(rows, cols))
