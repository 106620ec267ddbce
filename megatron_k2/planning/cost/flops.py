"""Arithmetic of one layer and one token, in FLOPs (a multiply-add is two)."""

import functools
from dataclasses import dataclass

from megatron_k2.optimizer.newton_schulz.coefficients import coefficient_set
from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.optimizer.newton_schulz.gram_restarts import restart_segments
from megatron_k2.planning.cost.adapters import matrix_shapes as adapter_shapes
from megatron_k2.planning.cost.matrices import matrix_shapes
from megatron_k2.presets import ModelPreset

FLASH_BACKWARD = 2.5
"""Backward over forward: a flash kernel forms Q Kᵀ again, so five products for two."""


@dataclass(frozen=True)
class Flops:
    """FLOPs by the kind of kernel that executes them."""

    gemm: float = 0.0
    grouped: float = 0.0
    """The routed experts' grouped products."""
    attention: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs of all three kinds of kernel together."""
        return self.gemm + self.grouped + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.gemm + other.gemm, self.grouped + other.grouped, self.attention + other.attention
        )

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.gemm * factor, self.grouped * factor, self.attention * factor)


def up_projections(p: ModelPreset) -> float:
    """One token from the latents to queries, keys and values: what ``mla_up`` computes again."""
    heads = p.num_attention_heads
    query = heads * (p.qk_head_dim + p.qk_pos_emb_head_dim) * (p.q_lora_rank or 0)
    return 2.0 * (query + heads * (p.qk_head_dim + p.v_head_dim) * p.kv_lora_rank)


def attention_forward(p: ModelPreset, seq_length: int, *, is_packed: bool = False) -> Flops:
    """One token through MLA; causal attention over half of ``seq_length`` on average.

    Of packed documents Megatron widens values to the width of queries for Transformer Engine.
    """
    heads = p.num_attention_heads
    qk = p.qk_head_dim + p.qk_pos_emb_head_dim
    value = qk if is_packed else p.v_head_dim
    down = p.hidden_size * (heads * qk if p.q_lora_rank is None else p.q_lora_rank)
    down += p.hidden_size * (p.kv_lora_rank + p.qk_pos_emb_head_dim)
    return Flops(
        gemm=2.0 * (down + heads * p.v_head_dim * p.hidden_size) + up_projections(p),
        attention=2.0 * heads * (qk + value) * (seq_length + 1) / 2,
    )


def mlp_forward(p: ModelPreset, *, is_moe: bool) -> Flops:
    """One token through the dense FFN, or router, shared expert and its chosen experts."""
    if not is_moe:
        return Flops(gemm=6.0 * p.hidden_size * p.ffn_hidden_size)
    shared = 6.0 * p.hidden_size * p.moe_shared_expert_intermediate_size
    return Flops(
        gemm=shared + 2.0 * p.hidden_size * p.num_moe_experts,
        grouped=6.0 * p.hidden_size * p.moe_ffn_hidden_size * p.moe_router_topk,
    )


def input_gradients(forward: Flops) -> Flops:
    """One product for each of the forward; norms and SwiGLU count as elementwise work."""
    return Flops(forward.gemm, forward.grouped, FLASH_BACKWARD * forward.attention)


def weight_gradients(forward: Flops) -> Flops:
    """One product for each of the forward with a weight; attention itself has none."""
    return Flops(forward.gemm, forward.grouped)


def head_forward(p: ModelPreset) -> Flops:
    """One token through the output head."""
    return Flops(2.0 * p.vocab_size * p.hidden_size)


def model_flops_per_token(p: ModelPreset, seq_length: int) -> float:
    """What MFU counts: forward and twice that, nothing recomputed."""
    total = head_forward(p)
    for layer in range(p.num_layers):
        total += attention_forward(p, seq_length)
        total += mlp_forward(p, is_moe=layer >= p.num_dense_layers)
    return 3 * total.total


def newton_schulz_segments(p: ModelPreset) -> tuple[int, ...]:
    """Steps between restarts, by a preset's flags: ``simple`` coefficients, ``bf16`` iteration."""
    schedule = coefficient_set("jordan").take(p.training.muon_ns_steps)
    return restart_segments(schedule, "bfloat16")


@functools.cache
def orthogonalisation(p: ModelPreset, lora_rank: int = 0) -> int:
    """Newton-Schulz on every matrix of the model once: one optimizer step of the whole world.

    With ``lora_rank`` on every factor of its adapters.

    What is executed on GPUs by default: of the plain and the Gram form the cheaper one for each
    shape, symmetric products formed whole. ``plan optimizer`` sums the same over its ranks.
    """
    segments = newton_schulz_segments(p)
    of_model = matrix_shapes(p) if not lora_rank else adapter_shapes(p, lora_rank)
    shapes = of_model.items()
    return sum(count * newton_schulz_flops(*shape, segments) for shape, count in shapes)
