"""What the planner makes of adapters: elements by hand, memory without frozen gradients, a fit."""

from collections import Counter
from dataclasses import replace

import pytest

from megatron_k2.errors import UserError
from megatron_k2.planning.cost import adapters
from megatron_k2.planning.cost.flops import orthogonalisation
from megatron_k2.planning.cost.memory import frozen_elements, rank_memory, rank_parameters
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.planning.estimate import estimate
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.request import RunRequest
from megatron_k2.presets import KIMI_K2, MOONLIGHT_16B_A3B
from tests.support.shapes import SMALL

RANK = 4


def by_hand(p, rank):
    """Every A and B of the model as (rows, columns), written out."""
    heads, h = p.num_attention_heads, p.hidden_size
    query = heads * (p.qk_head_dim + p.qk_pos_emb_head_dim)
    found = Counter()

    def linear(out, inputs, num_a=1, num_b=1):
        found[rank, inputs] += num_a
        found[out // num_b, rank] += num_b

    for layer in range(p.num_layers):
        linear(p.q_lora_rank, h)
        linear(query, p.q_lora_rank)
        linear(p.kv_lora_rank + p.qk_pos_emb_head_dim, h)
        linear(heads * (p.qk_head_dim + p.v_head_dim), p.kv_lora_rank)
        linear(h, heads * p.v_head_dim)
        is_moe = layer >= p.num_dense_layers
        width = p.moe_shared_expert_intermediate_size if is_moe else p.ffn_hidden_size
        linear(2 * width, h, 2, 2)
        linear(h, width)
        for _ in range(p.num_moe_experts if is_moe else 0):
            linear(2 * p.moe_ffn_hidden_size, h, 1, 2)
            linear(h, p.moe_ffn_hidden_size)
    return found


def test_matrices_and_elements_are_those_written_out():
    expected = by_hand(SMALL, RANK)
    assert adapters.matrix_shapes(SMALL, RANK) == expected
    assert adapters.total_elements(SMALL, RANK) == sum(
        rows * cols * count for (rows, cols), count in expected.items()
    )


def request(**changes):
    plan = RunRequest(
        preset=KIMI_K2,
        gpu=get_gpu("h200"),
        world_size=32,
        seq_length=8192,
        sequences_per_step=64,
        pp=8,
        ep=4,
        cp=2,
        lora_rank=32,
        document_tokens=4096,
        has_overlap=False,
    )
    return replace(plan, **changes)


def test_frozen_weights_have_neither_gradient_nor_state():
    plan = request()
    memory = rank_memory(plan, 1)
    assert memory.frozen == rank_parameters(plan, 1).total
    assert memory.gradients == 4 * memory.parameters.total
    assert memory.weights == 2 * (memory.parameters.total + memory.frozen)
    assert memory.parameters.total < 0.02 * memory.frozen
    whole = rank_memory(request(lora_rank=0), 1)
    assert (whole.frozen, whole.parameters) == (0, rank_parameters(plan, 1))


def test_a_base_in_fp8_is_half_of_one_in_bf16():
    plan = request(lora_base_fp8=True, fp8_storage=False)
    held, wide = (rank_memory(p, 1).weights for p in (plan, request()))
    assert 0.5 < held / wide < 0.52
    smaller = replace(plan, world_size=16, pp=4, ep=4, cp=1, seq_length=4096)
    assert not estimate(replace(smaller, lora_base_fp8=False)).fits
    with pytest.raises(UserError, match="lora_base_fp8: needs lora_rank, and no fp8_storage"):
        request(lora_base_fp8=True).check()


def test_all_ranks_hold_the_model_and_its_adapters_once():
    plan = request()
    experts = sum(
        rank_memory(plan, rank).parameters.expert_muon * plan.ep for rank in range(plan.pp)
    )
    dense = sum(rank_memory(plan, rank).parameters.dense_muon for rank in range(plan.pp))
    assert experts + dense == adapters.total_elements(KIMI_K2, 32)
    frozen_experts = sum(rank_parameters(plan, rank).expert_muon for rank in range(plan.pp))
    rest = sum(frozen_elements(plan, rank) for rank in range(plan.pp)) - frozen_experts
    assert rest + frozen_experts * plan.ep == count_parameters(KIMI_K2).trainable


def test_k2_fits_32_gpus_of_141_gb_with_adapters_alone():
    found = estimate(request())
    assert found.fits
    assert not estimate(request(lora_rank=0)).fits
    small = found.optimizer_seconds < 0.01 * found.step_seconds
    assert small, "Newton-Schulz of adapters is nothing beside the model's"
    assert orthogonalisation(KIMI_K2, 32) < 0.01 * orthogonalisation(KIMI_K2)


def test_a_step_without_weight_gradients_is_about_a_third_shorter():
    plan = replace(request(), preset=MOONLIGHT_16B_A3B, world_size=8, pp=1, ep=8, cp=1)
    ours, whole = (estimate(replace(plan, lora_rank=rank)).arithmetic_seconds for rank in (16, 0))
    assert 0.6 < ours / whole < 0.8


def test_a_negative_rank_is_refused():
    with pytest.raises(UserError, match="lora_rank=-1"):
        request(lora_rank=-1).check()
