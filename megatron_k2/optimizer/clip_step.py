"""QK-Clip's part of a step: which rows of which weights are scaled by how much."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_k2.optimizer.domain import MuonClipSettings
from megatron_k2.optimizer.max_logits import MaxLogits
from megatron_k2.optimizer.qk_clip import (
    clip_factor,
    mla_key_value_row_scale,
    mla_query_row_scale,
)


def row_scales(
    max_logits: MaxLogits, settings: MuonClipSettings
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """For every local attention, its query and key-value up-projection with their row factors.

    ``max_logits.finish()`` must have run. Factors are exactly 1 for heads below τ, for value rows,
    and for heads whose maximum is not finite; so they are always applied, and nothing is read back
    to the host.

    Yields:
        (weight, [rows of this rank's shard]).
    """
    for attention, row in zip(max_logits.attentions, max_logits.latest, strict=True):
        config = attention.config
        gamma = clip_factor(row, settings.qk_clip_threshold)
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
