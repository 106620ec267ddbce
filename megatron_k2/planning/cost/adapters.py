"""Low-rank adapters beside every linear: their elements, their arithmetic, what they keep.

LoRA (arXiv:2106.09685) as ``model/lora`` builds it: A [r, in] and B [out, r]; gate and up of dense
layers and shared experts with an A each, a routed expert's with one for both. Beside a linear cut
over tensor-parallel ranks the factor on the uncut side is whole on each.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_k2.presets import ModelPreset

Split = Literal["rows", "columns", "none"]
"""How a linear's weight is cut over tensor-parallel ranks."""


@dataclass(frozen=True)
class Linear:
    """One weight [out, in] with an adapter."""

    out: int
    inputs: int
    split: Split
    parts: int = 1
    """A's, one above the other."""
    outer: int = 1
    """Matrices of B, one above the other: gate and up."""

    def elements(self, rank: int, tp: int) -> int:
        """Of A and B on one tensor-parallel rank."""
        out = self.out // tp if self.split == "rows" else self.out
        inputs = self.inputs // tp if self.split == "columns" else self.inputs
        return rank * (self.parts * inputs + out)

    def flops(self, rank: int) -> float:
        """One token through A and B, all ranks together."""
        return 2.0 * rank * (self.parts * self.inputs + self.out)


def attention_linears(p: ModelPreset) -> tuple[Linear, ...]:
    """MLA's: the down-projections are whole on every rank."""
    heads = p.num_attention_heads
    query_rows = heads * (p.qk_head_dim + p.qk_pos_emb_head_dim)
    query: tuple[Linear, ...]
    if p.q_lora_rank is None:
        query = (Linear(query_rows, p.hidden_size, "rows"),)
    else:
        query = (
            Linear(p.q_lora_rank, p.hidden_size, "none"),
            Linear(query_rows, p.q_lora_rank, "rows"),
        )
    return (
        *query,
        Linear(p.kv_lora_rank + p.qk_pos_emb_head_dim, p.hidden_size, "none"),
        Linear(heads * (p.qk_head_dim + p.v_head_dim), p.kv_lora_rank, "rows"),
        Linear(p.hidden_size, heads * p.v_head_dim, "columns"),
    )


def swiglu_linears(p: ModelPreset, width: int, *, parts: int = 2) -> tuple[Linear, ...]:
    """Gate over up, and down."""
    return (
        Linear(2 * width, p.hidden_size, "rows", parts, outer=2),
        Linear(p.hidden_size, width, "columns"),
    )


def expert_linears(p: ModelPreset) -> tuple[Linear, ...]:
    """One routed expert's, whole on its rank."""
    return swiglu_linears(p, p.moe_ffn_hidden_size, parts=1)


def dense_linears(p: ModelPreset, *, is_moe: bool) -> tuple[Linear, ...]:
    """A layer's, its routed experts aside."""
    width = p.moe_shared_expert_intermediate_size if is_moe else p.ffn_hidden_size
    return (*attention_linears(p), *swiglu_linears(p, width))


def layer_elements(p: ModelPreset, rank: int, *, is_moe: bool, tp: int, ep: int) -> tuple[int, int]:
    """(dense, routed experts') elements of one layer on one rank."""
    dense = sum(one.elements(rank, tp) for one in dense_linears(p, is_moe=is_moe))
    if not is_moe:
        return dense, 0
    each = sum(one.elements(rank, 1) for one in expert_linears(p))
    return dense, p.num_moe_experts // ep * each


def total_elements(p: ModelPreset, rank: int) -> int:
    """Of the whole model's adapters."""
    kinds = [layer >= p.num_dense_layers for layer in range(p.num_layers)]
    return sum(sum(layer_elements(p, rank, is_moe=kind, tp=1, ep=1)) for kind in kinds)


def layer_flops(p: ModelPreset, rank: int, *, is_moe: bool) -> tuple[float, float]:
    """(dense, grouped) FLOPs of one token's forward through a layer's adapters."""
    dense = sum(one.flops(rank) for one in dense_linears(p, is_moe=is_moe))
    grouped = sum(one.flops(rank) for one in expert_linears(p)) * p.moe_router_topk
    return dense, grouped if is_moe else 0.0


def kept_bytes(p: ModelPreset, rank: int, *, is_moe: bool) -> float:
    """A token's values between A and B, bf16; the inputs of A are the linears' own."""
    inner = sum(one.parts for one in dense_linears(p, is_moe=is_moe))
    inner += p.moe_router_topk * len(expert_linears(p)) if is_moe else 0
    return 2.0 * rank * inner


def matrix_shapes(p: ModelPreset, rank: int) -> Counter[tuple[int, int]]:
    """[rows, cols] of every matrix that Muon orthogonalises -> how many in the model."""
    found: Counter[tuple[int, int]] = Counter()
    for layer in range(p.num_layers):
        is_moe = layer >= p.num_dense_layers
        linears = [(one, 1) for one in dense_linears(p, is_moe=is_moe)]
        linears += [(one, p.num_moe_experts) for one in expert_linears(p) if is_moe]
        for one, count in linears:
            found[rank, one.inputs] += count * one.parts
            found[one.out // one.outer, rank] += count * one.outer
    return found
