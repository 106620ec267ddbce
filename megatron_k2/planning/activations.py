"""What a layer keeps for its backward, tensor by tensor, on the Transformer Engine path.

One row a tensor that autograd holds from forward to backward, bytes a token of a micro-batch, bf16
unless said. Rows follow Megatron-Core 0.19.2's modules; a tensor that two modules keep is one row.
Selective recompute and FP8 storage (report, section 2.4.4) act on the rows they name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_k2.presets import ModelPreset

Recompute = Literal["norm", "swiglu", "mla_up"]
"""What is computed again: norm outputs; SwiGLU outputs; queries, keys and values from the latents
with the latents' norms (Megatron's ``layernorm``, ``moe_act``/``mlp``, ``mla_up_proj``)."""

FP8_TILE = 128
"""Report 2.4.4: 1 x 128 tiles."""
FP8_BYTES = 1 + 4 / FP8_TILE
"""E4M3 and an fp32 scale a tile."""
BF16 = 2


@dataclass(frozen=True)
class Kept:
    """One tensor held for the backward pass."""

    name: str
    bytes_per_token: float
    recompute: Recompute | None = None
    """Dropped when this is recomputed."""
    can_be_fp8: bool = False
    """Stored as FP8 tiles when that is on: inputs of the experts' up-projection and of SwiGLU."""


def attention_rows(p: ModelPreset, tp: int) -> Iterator[Kept]:
    """MLA and the norm before it, of one rank."""
    heads = p.num_attention_heads // tp
    qk = p.qk_head_dim + p.qk_pos_emb_head_dim
    yield Kept("attention norm input", BF16 * p.hidden_size / tp)
    yield Kept("attention norm output", BF16 * p.hidden_size / tp, "norm")
    if p.q_lora_rank is not None:
        yield Kept("query latent", BF16 * p.q_lora_rank / tp)
        yield Kept("query latent, normed", BF16 * p.q_lora_rank / tp, "mla_up")
    yield Kept("key-value latent and rotary key", BF16 * (p.kv_lora_rank + p.qk_pos_emb_head_dim))
    yield Kept("key-value latent, normed", BF16 * p.kv_lora_rank, "mla_up")
    yield Kept("query", BF16 * heads * qk, "mla_up")
    yield Kept("key", BF16 * heads * qk, "mla_up")
    yield Kept("value", BF16 * heads * p.v_head_dim, "mla_up")
    yield Kept("attention output", BF16 * heads * p.v_head_dim)
    yield Kept("softmax statistics", 4.0 * heads)


def swiglu_rows(name: str, width: float) -> Iterator[Kept]:
    """Between the projections of one SwiGLU of ``width`` on this rank."""
    yield Kept(f"{name} SwiGLU input", BF16 * 2 * width, can_be_fp8=True)
    yield Kept(f"{name} SwiGLU output", BF16 * width, "swiglu")


def mlp_rows(p: ModelPreset, tp: int, *, is_moe: bool) -> Iterator[Kept]:
    """Dense FFN, or router, experts and shared expert, and the norm before them.

    Experts are taken as evenly loaded: a rank then works on ``topk`` copies of each of its tokens.
    """
    yield Kept("MLP norm input", BF16 * p.hidden_size / tp)
    yield Kept("MLP norm output", BF16 * p.hidden_size / tp, "norm")
    if not is_moe:
        yield from swiglu_rows("dense", p.ffn_hidden_size / tp)
        return
    yield Kept("router scores and map", (4.0 + 4.0 + 1.0) * p.num_moe_experts / tp)
    yield Kept("expert input", BF16 * p.moe_router_topk * p.hidden_size / tp, can_be_fp8=True)
    yield from swiglu_rows("expert", p.moe_router_topk * p.moe_ffn_hidden_size / tp)
    yield Kept("routing weights", 4.0 * p.moe_router_topk / tp)
    yield from swiglu_rows("shared expert", p.moe_shared_expert_intermediate_size / tp)


def head_rows(p: ModelPreset, tp: int) -> Iterator[Kept]:
    """Final norm, output head and loss, of the last stage; held for one micro-batch only."""
    yield Kept("final norm input", BF16 * p.hidden_size / tp)
    yield Kept("final norm output", BF16 * p.hidden_size / tp)
    yield Kept("logits and softmax", (BF16 + 4.0) * p.vocab_size / tp)


def kept_bytes(
    rows: Iterator[Kept], recompute: frozenset[Recompute], *, fp8_storage: bool
) -> float:
    """Bytes a token of what remains of ``rows``."""
    total = 0.0
    for row in rows:
        if row.recompute in recompute:
            continue
        is_fp8 = fp8_storage and row.can_be_fp8
        total += row.bytes_per_token * (FP8_BYTES / BF16 if is_fp8 else 1.0)
    return total


def layer_bytes(
    p: ModelPreset,
    tp: int,
    *,
    is_moe: bool,
    recompute: frozenset[Recompute] = frozenset(),
    fp8_storage: bool = False,
) -> float:
    """Bytes a token that one layer keeps on one rank."""

    def rows() -> Iterator[Kept]:
        yield from attention_rows(p, tp)
        yield from mlp_rows(p, tp, is_moe=is_moe)

    return kept_bytes(rows(), recompute, fp8_storage=fp8_storage)
