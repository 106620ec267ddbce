"""Attention logits of one MLA layer by einsums, to recompute after a clip on the same inputs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MLALayer:
    """Latents and up-projections of one layer, fp64. A head's rows are adjacent, nope first."""

    num_heads: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    q_up: Tensor  # [h * (nope + rope), q_lora]
    kv_up: Tensor  # [h * (nope + v), kv_lora]
    q_latent: Tensor  # [b, s, q_lora]
    kv_latent: Tensor  # [b, s, kv_lora]
    rotary_key: Tensor  # [b, s, rope], before rotation

    def logits(self, q_up: Tensor, kv_up: Tensor, dtype: torch.dtype) -> Tensor:
        """[b, h, s, s], -inf above the diagonal; products in ``dtype``, the sum at least fp32."""
        h, nope = self.num_heads, self.qk_head_dim
        queries = torch.einsum("bsl,rl->bsr", self.q_latent.to(dtype), q_up.to(dtype))
        keys = torch.einsum("bsl,rl->bsr", self.kv_latent.to(dtype), kv_up.to(dtype))
        queries = queries.unflatten(-1, (h, -1))
        keys = keys.unflatten(-1, (h, -1))
        accumulate = torch.promote_types(dtype, torch.float32)
        unrotated = torch.einsum(
            "bihd,bjhd->bhij", queries[..., :nope].to(accumulate), keys[..., :nope].to(accumulate)
        )
        rotated = torch.einsum(
            "bihd,bjd->bhij",
            rotate(queries[..., nope:].transpose(1, 2)).transpose(1, 2).to(accumulate),
            rotate(self.rotary_key.to(dtype)).to(accumulate),
        )
        scores = (unrotated + rotated) / math.sqrt(nope + self.qk_pos_emb_head_dim)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -math.inf)

    def values(self, kv_up: Tensor) -> Tensor:
        """[b, s, h, v] fp64."""
        kv = torch.einsum("bsl,rl->bsr", self.kv_latent, kv_up.double())
        return kv.unflatten(-1, (self.num_heads, -1))[..., self.qk_head_dim :]


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding over the last dimension, position on the one before it, x's dtype."""
    dim = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)


def mla_layer_with_hot_and_cold_heads(seed: int = 1) -> MLALayer:
    """Eight heads whose largest logits go from about 4 to several hundred."""
    g = torch.Generator().manual_seed(seed)
    h, nope, rope, v, q_lora, kv_lora, batch, seq = 8, 32, 16, 32, 48, 24, 2, 40

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    heat = torch.linspace(0.3, 2.2, h, dtype=torch.float64)[:, None, None]
    return MLALayer(
        num_heads=h,
        qk_head_dim=nope,
        qk_pos_emb_head_dim=rope,
        v_head_dim=v,
        q_up=(randn(h, nope + rope, q_lora) * heat * 0.5).flatten(0, 1),
        kv_up=(randn(h, nope + v, kv_lora) * heat * 0.7).flatten(0, 1),
        q_latent=randn(batch, seq, q_lora),
        kv_latent=randn(batch, seq, kv_lora),
        rotary_key=randn(batch, seq, rope) * 2,
    )
