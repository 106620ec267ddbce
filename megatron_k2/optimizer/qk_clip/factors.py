"""QK-Clip's arithmetic: γ of each head, and which rows of which weight it scales.

Kimi K2 report (arXiv:2507.20534), section 2.1. After the optimizer step, for every head h with
S_max^h > τ: γ_h = τ / S_max^h, then (α = 0.5)

    W_qc^h <- W_qc^h · γ_h^α        query, part without rotation
    W_kc^h <- W_kc^h · γ_h^(1−α)    key, part without rotation
    W_qr^h <- W_qr^h · γ_h          rotary query: all of γ, since its partner is shared
    k_R, values                     untouched: the rotary key serves every head

so that on the same inputs every logit of head h is multiplied by γ_h. Weights are scaled as whole
rows, hence a row-scale vector per weight, which also applies to any flat piece of it (a ZeRO
shard).

No collective, no module walk, no host synchronisation: always multiplied, by exactly 1 for cold
heads.

Legend: ``h`` heads on this tensor-parallel rank, ``g`` query groups on this rank.
"""

from typing import Literal

import torch
from torch import Tensor

GroupedQueryMode = Literal["query", "group"]


def clip_factor(max_logit: Tensor, threshold: float) -> Tensor:
    """γ per head: τ / S_max where a head is over the threshold, exactly 1 elsewhere.

    Kimi K2 report (arXiv:2507.20534), QK-Clip. ``min(1, τ / S)`` is not the same thing: a head
    whose largest logit is negative would get a negative γ, and its square root is NaN. A logit that
    overflowed says nothing about by how much; γ = 0 would wipe the head out for ever, so it gets 1.

    Args:
        max_logit: S_max, the largest pre-softmax logit of each head this step, [h] fp32 (any
            shape). Already reduced over micro-batches and over the data- and context-parallel
            ranks.
        threshold: τ, in logits. The report uses 100.

    Returns:
        γ, of ``max_logit``'s shape and dtype, in (0, 1].

    Raises:
        ValueError: if ``threshold`` is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: expected a positive logit; the report uses 100")
    is_hot = torch.isfinite(max_logit) & (max_logit > threshold)
    return torch.where(is_hot, threshold / torch.where(is_hot, max_logit, threshold), 1)


def num_clipped(gamma: Tensor) -> Tensor:
    """Heads that are scaled, a 0-d int64 tensor on ``gamma``'s device."""
    return (gamma < 1).sum()


def mla_query_row_scale(
    gamma: Tensor, qk_head_dim: int, qk_pos_emb_head_dim: int, alpha: float = 0.5
) -> Tensor:
    """Row scale of ``linear_q_up_proj`` (or ``linear_q_proj`` without a query latent).

    Args:
        gamma: γ, [h].
        qk_head_dim: rows of W_qc of one head, which come first.
        qk_pos_emb_head_dim: rows of W_qr of one head.
        alpha: α, the query's share of γ where both sides are the head's own.

    Returns:
        [h · (qk_head_dim + qk_pos_emb_head_dim)], ``gamma``'s dtype.
    """
    per_head = [(_power(gamma, alpha), qk_head_dim), (gamma, qk_pos_emb_head_dim)]
    return _rows(per_head).flatten()


def mla_key_value_row_scale(
    gamma: Tensor, qk_head_dim: int, v_head_dim: int, alpha: float = 0.5
) -> Tensor:
    """Row scale of ``linear_kv_up_proj``: γ^(1−α) for each head's key rows, 1 for its value rows.

    Args:
        gamma: γ, [h].
        qk_head_dim: rows of W_kc of one head, which come first.
        v_head_dim: rows of W_v of one head.
        alpha: α.

    Returns:
        [h · (qk_head_dim + v_head_dim)], ``gamma``'s dtype.
    """
    per_head = [(_power(gamma, 1 - alpha), qk_head_dim), (torch.ones_like(gamma), v_head_dim)]
    return _rows(per_head).flatten()


def gqa_row_scale(
    gamma: Tensor,
    num_query_groups: int,
    head_dim: int,
    alpha: float = 0.5,
    mode: GroupedQueryMode = "query",
) -> Tensor:
    """Row scale of a fused ``linear_qkv`` whose keys serve several query heads.

    The report does not treat this case. ``query`` follows what it does for the shared rotary key:
    the hot query head takes all of γ and nobody else is touched. ``group`` is Megatron-Core's rule:
    the hottest head's γ for the whole group, split between queries and key.

    Args:
        gamma: γ, [h], heads of a group adjacent.
        num_query_groups: g, on this rank.
        head_dim: rows of one head.
        alpha: α; only ``group`` splits γ.
        mode: see above.

    Returns:
        [g · (h/g + 2) · head_dim] in Megatron's order, per group its query heads, key, value.
    """
    if gamma.numel() % num_query_groups:
        raise ValueError(
            f"{gamma.numel()} heads do not divide by num_query_groups={num_query_groups}"
        )
    gamma = gamma.view(num_query_groups, -1)
    ones = torch.ones_like(gamma[:, :1])
    if mode == "query":
        scale = torch.cat((gamma, ones, ones), dim=1)
    elif mode == "group":
        hottest = gamma.amin(dim=1, keepdim=True)
        query = _power(hottest, alpha).expand_as(gamma)
        scale = torch.cat((query, _power(hottest, 1 - alpha), ones), dim=1)
    else:
        raise ValueError(f"mode={mode!r}: expected query or group")
    return scale.repeat_interleave(head_dim, dim=1).flatten()


def scale_rows_(
    weight_shard: Tensor, row_scale: Tensor, row_length: int, start: int, end: int
) -> None:
    """Multiply elements [start, end) of a row-major weight by their rows' scales, in place.

    Args:
        weight_shard: [end − start], contiguous: those elements, the fp32 master's or the bf16
            weight's. A bf16 weight is rounded once, from the fp32 product.
        row_scale: [rows] of the whole weight on this tensor-parallel rank.
        row_length: columns of the weight.
        start: first element; need not begin a row.
        end: one past the last.

    Raises:
        ValueError: if the shard is not [start, end) of a [rows, row_length] weight.
    """
    size = row_scale.numel() * row_length
    if not 0 <= start <= end <= size or weight_shard.shape != (end - start,):
        raise ValueError(
            f"shard of shape {tuple(weight_shard.shape)} for [{start}, {end}) of {size} elements; "
            "expected a flat tensor of end - start inside the weight"
        )
    # A partial first row, whole rows as one block, a partial last row: no index tensor, no copy.
    first_whole = min(-(-start // row_length) * row_length, end)
    last_whole = max(end // row_length * row_length, first_whole)
    if start < first_whole:
        weight_shard[: first_whole - start].mul_(row_scale[start // row_length])
    if first_whole < last_whole:
        rows = row_scale[first_whole // row_length : last_whole // row_length]
        block = weight_shard[first_whole - start : last_whole - start]
        block.view(-1, row_length).mul_(rows[:, None])
    if last_whole < end:
        weight_shard[last_whole - start :].mul_(row_scale[end // row_length])


def _power(gamma: Tensor, exponent: float) -> Tensor:
    # Not left to pow: a cold head must keep its bits whatever the device's pow(1, x) rounds to.
    return torch.where(gamma == 1, 1, gamma**exponent)


def _rows(parts: list[tuple[Tensor, int]]) -> Tensor:
    """[h, sum of lengths] from per-head values [h] and the number of rows each fills."""
    return torch.cat([value[:, None].expand(-1, length) for value, length in parts], dim=1)
