"""Newton-Schulz on all of a model, against the matrices written out and a count by hand."""

from dataclasses import replace

import pytest

from megatron_k2.planning.cost.flops import newton_schulz_segments, orthogonalisation
from megatron_k2.planning.cost.matrices import matrix_shapes
from megatron_k2.presets import KIMI_K2, MOONLIGHT_16B_A3B


def _matrices(p):
    """(rows, cols, how many) of every matrix, gate and up apart."""
    heads, h = p.num_attention_heads, p.hidden_size
    qk = p.qk_head_dim + p.qk_pos_emb_head_dim
    query = [(heads * qk, h)]
    if p.q_lora_rank is not None:
        query = [(p.q_lora_rank, h), (heads * qk, p.q_lora_rank)]
    attention = [
        *query,
        (p.kv_lora_rank + p.qk_pos_emb_head_dim, h),
        (heads * (p.qk_head_dim + p.v_head_dim), p.kv_lora_rank),
        (h, heads * p.v_head_dim),
    ]
    moe = p.num_layers - p.num_dense_layers
    shared = p.moe_shared_expert_intermediate_size
    return [
        *((*shape, p.num_layers) for shape in attention),
        *_swiglu(p.ffn_hidden_size, h, p.num_dense_layers),
        *_swiglu(p.moe_ffn_hidden_size, h, moe * p.num_moe_experts),
        *_swiglu(shared, h, moe),
        (p.num_moe_experts, h, moe),
    ]


def _swiglu(width, hidden, count):
    return [(width, hidden, 2 * count), (hidden, width, count)]


def _by_hand(rows, cols):
    """Five steps of jordan in bf16, one restart: in n³, plain 20 r + 10 and Gram 8 r + 28."""
    n, m = sorted((rows, cols))
    return min(20 * n * n * m + 10 * n**3, 8 * n * n * m + 28 * n**3)


PRESETS = (KIMI_K2, MOONLIGHT_16B_A3B, replace(KIMI_K2, q_lora_rank=None))


@pytest.mark.parametrize("p", PRESETS, ids=["K2", "Moonlight", "K2 without a query latent"])
def test_a_step_orthogonalises_every_matrix_in_its_cheaper_form(p):
    assert newton_schulz_segments(p) == (3, 2)
    counts = dict.fromkeys(matrix_shapes(p), 0)
    for rows, cols, count in _matrices(p):
        counts[rows, cols] += count
    assert counts == dict(matrix_shapes(p))
    by_hand = sum(count * _by_hand(rows, cols) for rows, cols, count in _matrices(p))
    assert orthogonalisation(p) == by_hand


def test_a_fused_weight_taken_for_one_matrix_would_be_seen():
    p = KIMI_K2
    fused = 60 * 384 * (_by_hand(2 * p.moe_ffn_hidden_size, p.hidden_size))
    split = 60 * 384 * 2 * _by_hand(p.moe_ffn_hidden_size, p.hidden_size)
    assert abs(fused - split) > 0.1 * orthogonalisation(p)
