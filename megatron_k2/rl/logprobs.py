"""Log-probabilities of sampled tokens from logits split over the vocabulary.

At the temperature they were sampled at: ``log softmax(z / T)``. A chunk of tokens at a time in
fp32, forward and backward, so that fp32 of [tokens, vocabulary] never exists whole; what is kept
for the backward pass is the logits themselves and one number a token.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.errors import UserError

CHUNK_TOKENS = 1024
"""Ours: 640 MiB of fp32 at K2's vocabulary of 163,840, unsplit."""


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy it was drawn at.

    Args:
        logits: [tokens, P / TP] of this tensor-parallel rank, any float dtype; padding's columns
            are -inf (``model/vocabulary.py``).
        targets: [tokens] ids of the whole vocabulary, the same on every rank.
        temperature: one, or [tokens]; more than 0.
        group: tensor-parallel ranks, in the order of their columns; ``None``: the logits are whole.
        chunk_tokens: in fp32 at once.

    Returns:
        Two [tokens] in fp32, already reduced over ``group``; the first is differentiable in the
        logits, the second is a measurement.

    Raises:
        UserError: shapes differ, or a temperature is not more than 0.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise UserError(
            f"logits {list(logits.shape)}, targets {list(targets.shape)}: expected "
            "[tokens, vocabulary] and [tokens]"
        )
    shape = targets.shape
    scale = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device).expand(shape)
    if not bool((scale > 0).all()):
        raise UserError(f"temperature {float(scale.min()):g}: expected more than 0")
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(
        logits, targets, scale, group, max(chunk_tokens, 1)
    )
    return found


def _reduced(value: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    if group is not None:
        dist.all_reduce(value, op, group)
    return value


def _places(targets: Tensor, width: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Columns of the targets on this rank, and which of them it holds."""
    place = targets - (0 if group is None else dist.get_rank(group) * width)
    is_mine = (place >= 0) & (place < width)
    return torch.where(is_mine, place, 0), is_mine


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        scale: Tensor,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        place, is_mine = _places(targets, logits.shape[1], group)
        logprobs, entropy, normaliser = scale.new_empty(3, len(targets))
        for first in range(0, len(targets), chunk_tokens):
            part = slice(first, first + chunk_tokens)
            z = logits[part].float() / scale[part, None]
            most = _reduced(z.amax(-1), group, dist.ReduceOp.MAX)
            own = z.gather(1, place[part, None])[:, 0]
            own = torch.where(is_mine[part], own, 0.0)
            weights = (z - most[:, None]).exp()
            moment = torch.where(weights > 0, weights * z, 0.0).sum(-1)
            total, own, moment = _reduced(torch.stack([weights.sum(-1), own, moment]), group)
            normaliser[part] = most + total.log()
            logprobs[part] = own - normaliser[part]
            entropy[part] = normaliser[part] - moment / total
        ctx.save_for_backward(logits, place, is_mine, scale, normaliser)
        ctx.chunk_tokens = chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, place, is_mine, scale, normaliser = ctx.saved_tensors
        found = torch.empty_like(logits)
        for first in range(0, len(grad), ctx.chunk_tokens):
            part = slice(first, first + ctx.chunk_tokens)
            z = logits[part].float() / scale[part, None]
            slope = (z - normaliser[part, None]).exp().neg_()
            slope.scatter_add_(1, place[part, None], is_mine[part, None].to(slope.dtype))
            found[part] = (slope * (grad[part] / scale[part])[:, None]).to(found.dtype)
        return found, None, None, None, None
