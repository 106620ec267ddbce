"""What a layer keeps for its backward, tensor by tensor, of Transformer Engine's modules.

One row a tensor that autograd holds from forward to backward, bytes a token of a micro-batch, bf16
unless said. Rows follow Megatron-Core 0.19.2's modules with its fused SwiGLU; a tensor that two
modules keep is one row. Selective recompute and FP8 storage (report, section 2.4.4) act on the rows
they name. Counted against autograd's own hooks in ``tests/te/test_activations.py``. The fused
attention is not: it keeps queries, keys, values, its output and a statistic a row (cuDNN's and
FlashAttention's papers). Transformer Engine's fused router and permutation keep less than the rows
here, by up to one per cent of a layer.
"""

import functools
import itertools
from collections.abc import Iterator

from megatron_k2.planning.cost.kept import Kept, OffloadModule
from megatron_k2.planning.request import Modules, Recompute
from megatron_k2.presets import ModelPreset

FP8_TILE = 128
"""Report 2.4.4: 1 x 128 tiles."""
FP8_BYTES = 1 + 4 / FP8_TILE
"""E4M3 and an fp32 scale a tile."""
BF16 = 2


def attention_rows(p: ModelPreset, tp: int) -> Iterator[Kept]:
    """MLA and the norm before it, of one rank."""
    heads = p.num_attention_heads // tp
    qk = p.qk_head_dim + p.qk_pos_emb_head_dim
    yield from _norm_rows("attention norm", p.hidden_size / tp, "norm", "attn_norm")
    if p.q_lora_rank is not None:
        yield from _norm_rows("query latent", p.q_lora_rank, "mla_up")
    yield from _norm_rows("key-value latent", p.kv_lora_rank, "mla_up")
    yield Kept("rotary tables", 4.0 * BF16 * p.qk_pos_emb_head_dim)
    yield Kept("query", BF16 * heads * qk, "mla_up", offload="core_attn")
    yield Kept("key", BF16 * heads * qk, "mla_up", offload="core_attn")
    yield Kept("value", BF16 * heads * p.v_head_dim, "mla_up", offload="core_attn")
    # The attention keeps it and so does the projection: the device has it until both let go.
    output = BF16 * heads * p.v_head_dim
    yield Kept("attention output", output, offload="attn_proj", copies_on_host=2)
    yield Kept("softmax statistics", 4.0 * heads)


def packed_attention_bytes(p: ModelPreset, tp: int, recompute: frozenset[Recompute]) -> float:
    """Bytes a token that packed documents keep beyond ``attention_rows``.

    Values and output are widened to the queries' width for the attention, which keeps that output
    beside the one that goes on.
    """
    heads = p.num_attention_heads // tp
    qk = p.qk_head_dim + p.qk_pos_emb_head_dim
    wider = 0 if "mla_up" in recompute else qk - p.v_head_dim
    return float(BF16 * heads * (qk + wider))


def _norm_rows(
    name: str, width: float, recompute: Recompute, offload: OffloadModule | None = None
) -> Iterator[Kept]:
    yield Kept(f"{name}, input", BF16 * width, offload=offload)
    yield Kept(f"{name}, output", BF16 * width, recompute)
    yield Kept(f"{name}, statistic", 4.0)


def swiglu_rows(name: str, width: float, recompute: Recompute | None = None) -> Iterator[Kept]:
    """Between the projections of one SwiGLU of ``width`` on this rank."""
    offload: OffloadModule | None = None if recompute is None else "moe_act"
    yield Kept(f"{name} SwiGLU input", BF16 * 2 * width, offload=offload, can_be_fp8=True)
    yield Kept(f"{name} SwiGLU output", BF16 * width, recompute)


def mlp_rows(p: ModelPreset, tp: int, *, is_moe: bool) -> Iterator[Kept]:
    """Dense FFN, or router, experts and shared expert, and the norm before them.

    Experts are taken as evenly loaded: a rank then works on ``topk`` copies of each of its tokens.
    """
    # A dense layer's norm is inside its first linear, which no group brackets.
    yield from _norm_rows("MLP norm", p.hidden_size / tp, "norm", "mlp_norm" if is_moe else None)
    if not is_moe:
        yield from swiglu_rows("dense", p.ffn_hidden_size / tp)
        return
    yield Kept("router scores, fp32, twice", 8.0 * p.num_moe_experts / tp)
    yield Kept("order of the tokens, int64", 8.0 * p.num_moe_experts / tp)
    yield Kept("chosen experts and their weights", (4 * 8.0 + 2 * 4.0) * p.moe_router_topk / tp)
    copies = p.moe_router_topk * p.hidden_size / tp
    yield Kept("expert input", BF16 * copies, offload="expert_fc1", can_be_fp8=True)
    yield from swiglu_rows("expert", p.moe_router_topk * p.moe_ffn_hidden_size / tp, "swiglu")
    yield from swiglu_rows("shared expert", p.moe_shared_expert_intermediate_size / tp)


def head_rows(p: ModelPreset, tp: int) -> Iterator[Kept]:
    """Final norm, output head and loss, of the last stage; held for one micro-batch only."""
    yield Kept("final norm input", BF16 * p.hidden_size / tp)
    yield Kept("final norm output", BF16 * p.hidden_size / tp)
    yield Kept("softmax over the vocabulary, fp32", 4.0 * p.vocab_size / tp)


def kept_bytes(
    rows: Iterator[Kept],
    recompute: frozenset[Recompute],
    *,
    fp8_storage: bool,
    element_bytes: int = BF16,
) -> float:
    """Bytes a token of what remains of ``rows``."""
    total = 0.0
    for row in rows:
        is_replaced = row.instead_of is not None and row.instead_of not in recompute
        if row.recompute in recompute or is_replaced:
            continue
        is_fp8 = fp8_storage and row.can_be_fp8
        total += row.bytes_per_token * (FP8_BYTES / element_bytes if is_fp8 else 1.0)
    return total


PASSES: dict[Recompute, int] = {"norm": 2, "swiglu": 3}
"""Memory passes over a dropped row to form it again: input (SwiGLU's is twice as wide) and output.
What ``mla_up`` forms again is bound by its products, which ``flops.up_projections`` counts."""


def formed_again_bytes(
    p: ModelPreset, tp: int, recompute: frozenset[Recompute], *, is_moe: bool
) -> tuple[float, float]:
    """Bytes a token read and written by elementwise recompute, (of attention, of the MLP)."""
    attention, mlp = (
        sum(
            PASSES[row.recompute] * row.bytes_per_token
            for row in rows
            if row.recompute in recompute and row.recompute in PASSES
        )
        for rows in (attention_rows(p, tp), mlp_rows(p, tp, is_moe=is_moe))
    )
    return attention, mlp


def layer_rows(
    p: ModelPreset, tp: int, *, is_moe: bool, fp8_storage: bool, modules: Modules
) -> Iterator[Kept]:
    """All that one layer of ``modules`` keeps."""
    if modules == "local":
        from megatron_k2.planning.cost.local_activations import local_rows

        return local_rows(p, tp, is_moe=is_moe, is_swiglu_fused=fp8_storage)
    return itertools.chain(attention_rows(p, tp), mlp_rows(p, tp, is_moe=is_moe))


@functools.cache
def layer_bytes(
    p: ModelPreset,
    tp: int,
    *,
    is_moe: bool,
    recompute: frozenset[Recompute] = frozenset(),
    fp8_storage: bool = False,
    modules: Modules = "transformer_engine",
) -> float:
    """Bytes a token that one layer keeps on one rank, in bf16."""
    rows = layer_rows(p, tp, is_moe=is_moe, fp8_storage=fp8_storage, modules=modules)
    return kept_bytes(rows, recompute, fp8_storage=fp8_storage)


def head_bytes(p: ModelPreset, tp: int, modules: Modules = "transformer_engine") -> float:
    """Bytes a token that final norm, head and loss keep."""
    if modules == "local":
        from megatron_k2.planning.cost.local_activations import local_head_rows

        return kept_bytes(local_head_rows(p, tp), frozenset(), fp8_storage=False)
    return kept_bytes(head_rows(p, tp), frozenset(), fp8_storage=False)
