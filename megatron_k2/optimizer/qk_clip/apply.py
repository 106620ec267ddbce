"""QK-Clip's part of a step: which rows of which weights are scaled by how much."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.optimizer.qk_clip.factors import (
    clip_factor,
    gqa_row_scale,
    mla_key_value_row_scale,
    mla_query_row_scale,
)
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.settings import MuonClipSettings


def check_clippable(max_logits: MaxLogits) -> None:
    """Refuse attention whose logits the clip could not lower.

    MLA's norms on the latents come before the up-projections and are fine. A norm after the
    projection undoes any scaling of its weights.

    Raises:
        UserError: naming the module and the way out.
    """
    refuse_silent(max_logits.silent)
    for attention in max_logits.attentions:
        if isinstance(attention, MultiLatentAttention):
            continue
        for name in ("q_layernorm", "k_layernorm"):
            norm = getattr(attention, name, None)
            if norm is not None and not isinstance(norm, IdentityOp):
                raise UserError(
                    f"QK-Clip cannot act on layer {attention.layer_number}: {name} normalises "
                    "after the projection it would scale; drop --qk-layernorm, which bounds the "
                    "logits itself, or train with --optimizer muon"
                )


def refuse_silent(attentions: list[Any]) -> None:
    """Refuse attention that gives no maximum logits: none of its heads would ever be clipped.

    Args:
        attentions: whose core has no ``current_max_attn_logits`` (known when the model is built),
            or left it without a value (known after the first step).

    Raises:
        UserError: naming the first and the way out.
    """
    if not attentions:
        return
    first = attentions[0]
    core = type(first.core_attention)
    raise UserError(
        f"QK-Clip cannot see the logits of layer {first.layer_number}"
        f"{f' and {len(attentions) - 1} more' if len(attentions) > 1 else ''}: its core attention "
        f"{core.__module__}.{core.__name__} gives no maximum logits (current_max_attn_logits); "
        "take --transformer-impl local or a Transformer Engine that returns them, or train with "
        "--optimizer muon"
    )


def row_scales(
    max_logits: MaxLogits, settings: MuonClipSettings
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """For every local attention, the parameters whose rows the clip scales, with their factors.

    ``max_logits.finish()`` must have run. Factors are exactly 1 for heads below τ, for value rows,
    and for heads whose maximum is not finite; so they are always applied, and nothing is read back
    to the host. Of a frozen weight there is none: under adapters nothing is clipped, since other
    adapters use the same base, and no product of low rank scales its rows.

    Yields:
        (weight or bias, [rows of this rank's shard]).
    """
    for param, scale in _all_scales(max_logits, settings):
        if param.requires_grad:
            yield param, scale


def _all_scales(
    max_logits: MaxLogits, settings: MuonClipSettings
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    for attention, row in zip(max_logits.attentions, max_logits.latest, strict=True):
        gamma = clip_factor(row, settings.qk_clip_threshold)
        if isinstance(attention, MultiLatentAttention):
            yield from _mla_scales(attention, gamma, settings)
            continue
        groups = attention.num_query_groups_per_partition
        # One key a query head (MHA) is a group of one: the report's split between both sides.
        mode = "group" if groups == gamma.numel() else settings.grouped_query_mode
        head_dim = attention.hidden_size_per_attention_head
        scale = gqa_row_scale(gamma, groups, head_dim, settings.qk_clip_alpha, mode)
        yield attention.linear_qkv.weight, scale
        if attention.linear_qkv.bias is not None:
            yield attention.linear_qkv.bias, scale


def _mla_scales(
    attention: Any, gamma: Tensor, settings: MuonClipSettings
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    config = attention.config
    has_latent = config.q_lora_rank is not None
    query = attention.linear_q_up_proj if has_latent else attention.linear_q_proj
    yield (
        query.weight,
        mla_query_row_scale(
            gamma, config.qk_head_dim, config.qk_pos_emb_head_dim, settings.qk_clip_alpha
        ),
    )
    yield (
        attention.linear_kv_up_proj.weight,
        mla_key_value_row_scale(
            gamma, config.qk_head_dim, config.v_head_dim, settings.qk_clip_alpha
        ),
    )
