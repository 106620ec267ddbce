"""Rotary positions with YaRN, and what YaRN does to the softmax's scale.

YaRN (arXiv:2309.00071, section 3.2) as DeepSeek-V3 and K2 use it: frequencies that turn more than
``beta_fast`` times within the original context stay, those that turn less than ``beta_slow`` times
are divided by the factor, between them a line. Cosine and sine are multiplied by
mscale / mscale_all_dim, the logits by mscale_all_dim², each of them 0.1 m ln(factor) + 1.
"""

import math

import torch
from torch import Tensor

from megatron_k2.presets import ModelPreset, YarnScaling


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _turns_at(yarn: YarnScaling, turns: float, width: int, base: float) -> float:
    """Which dimension turns so often within the original context."""
    length = yarn.original_max_position_embeddings
    return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))


def frequencies(preset: ModelPreset) -> Tensor:
    """Radians a position, [r / 2] fp32."""
    width, base, yarn = preset.qk_pos_emb_head_dim, preset.rotary_base, preset.yarn
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if yarn is None:
        return plain
    low = max(math.floor(_turns_at(yarn, yarn.beta_fast, width, base)), 0)
    high = min(math.ceil(_turns_at(yarn, yarn.beta_slow, width, base)), width - 1)
    span = (high - low) or 0.001
    divided = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / yarn.rotary_scaling_factor * divided + plain * (1 - divided)


def tables(preset: ModelPreset, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, [length, r / 2] fp32 each."""
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies(preset)
    factor = 1.0
    if (yarn := preset.yarn) is not None:
        scaling = yarn.rotary_scaling_factor
        factor = _mscale(scaling, yarn.mscale) / _mscale(scaling, yarn.mscale_all_dim)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def softmax_scale(preset: ModelPreset) -> float:
    """What multiplies a query's product with a key."""
    scale = (preset.qk_head_dim + preset.qk_pos_emb_head_dim) ** -0.5
    if (yarn := preset.yarn) is not None:
        scale *= _mscale(yarn.rotary_scaling_factor, yarn.mscale_all_dim) ** 2
    return scale


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of the last dimension turned; the result holds all first, then all second.

    Queries and keys are reordered alike, so their products are as in pairs.

    Args:
        x: [..., r].
        cos: [..., r / 2], broadcast against x.
        sin: the same.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    turned_pair = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned_pair, -1).to(x.dtype)
