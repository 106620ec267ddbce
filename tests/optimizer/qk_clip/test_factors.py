"""QK-Clip on the same inputs: every logit of a hot head is γ times what it was, nothing else moves.

Not exercised: reduction of S_max over ranks, and where it comes from; those live elsewhere.
"""

import math

import pytest
import torch

from megatron_k2.optimizer.qk_clip.factors import (
    clip_factor,
    gqa_row_scale,
    mla_key_value_row_scale,
    mla_query_row_scale,
    num_clipped,
    scale_rows_,
)
from tests.oracles.clip import mla_layer_with_hot_and_cold_heads

THRESHOLD = 100.0
LAYER = mla_layer_with_hot_and_cold_heads()

# One rounding of each weight and of each product: fp64 and fp32 by their unit, times the
# cancellation of a logit against its terms (about 10). bf16 weights are rounded again after the
# clip, 2⁻⁹ each, and 32 + 16 independent terms average that down to about 1e-3 of the largest
# logit.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 5e-3}


def clipped(dtype, alpha, query_scale=mla_query_row_scale, factor=clip_factor):
    """Logits before and after, [b, h, s, s]; γ; weights before and after, in ``dtype``."""
    q_up, kv_up = LAYER.q_up.to(dtype), LAYER.kv_up.to(dtype)
    before = LAYER.logits(q_up, kv_up, dtype)
    gamma = factor(before.amax((0, 2, 3)), THRESHOLD)
    query = query_scale(gamma, LAYER.qk_head_dim, LAYER.qk_pos_emb_head_dim, alpha)
    key_value = mla_key_value_row_scale(gamma, LAYER.qk_head_dim, LAYER.v_head_dim, alpha)
    q_new, kv_new = q_up.clone(), kv_up.clone()
    scale_rows_(q_new.view(-1), query, q_up.shape[1], 0, q_up.numel())
    scale_rows_(kv_new.view(-1), key_value, kv_up.shape[1], 0, kv_up.numel())
    after = LAYER.logits(q_new, kv_new, dtype)
    return before, after, gamma, (q_up, kv_up), (q_new, kv_new)


def error(before, after, gamma):
    """Largest |L' − γL| over the largest |L|, masked positions aside."""
    seen = before.isfinite()
    expected = before * gamma[None, :, None, None]
    return ((after - expected)[seen].abs().max() / before[seen].abs().max()).item()


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_logit_is_scaled_by_its_heads_gamma(dtype, alpha, record_property):
    before, after, gamma, _, _ = clipped(dtype, alpha)
    hot = gamma < 1
    assert 0 < hot.sum() < LAYER.num_heads
    record_property("difference", error(before, after, gamma))
    record_property("bar", TOLERANCE[dtype])
    assert error(before, after, gamma) <= TOLERANCE[dtype]
    largest = after.amax((0, 2, 3))
    assert ((largest - THRESHOLD).abs() / THRESHOLD)[hot].max().item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_cold_heads_and_all_values_keep_their_bits(dtype):
    before, after, gamma, old, new = clipped(dtype, 0.5)
    cold = gamma == 1
    assert torch.equal(before[:, cold], after[:, cold])
    heads = LAYER.num_heads
    for weight, scaled in zip(old, new, strict=True):
        assert torch.equal(
            weight.unflatten(0, (heads, -1))[cold], scaled.unflatten(0, (heads, -1))[cold]
        )
    assert torch.equal(LAYER.values(old[1]), LAYER.values(new[1]))


def test_root_of_gamma_on_the_rotary_query_is_seen():
    def wrong(gamma, qk_head_dim, qk_pos_emb_head_dim, alpha):
        return gamma.pow(alpha).repeat_interleave(qk_head_dim + qk_pos_emb_head_dim)

    before, after, gamma, _, _ = clipped(torch.float64, 0.5, query_scale=wrong)
    assert error(before, after, gamma) > 1e-2


def test_clamping_the_ratio_turns_a_negative_maximum_into_nan():
    """``clamp(τ / S, max=1)``, as Megatron-Core 0.19.2 has it, beside ours, on S = −3."""
    largest = torch.tensor([-3.0, 250.0])
    wrong = torch.clamp(THRESHOLD / largest, max=1.0)
    assert mla_query_row_scale(wrong, 2, 1)[:2].isnan().all()
    ours = mla_query_row_scale(clip_factor(largest, THRESHOLD), 2, 1)
    assert ours.tolist() == pytest.approx([1, 1, 1, 0.4**0.5, 0.4**0.5, 0.4])


def test_factor_is_exactly_one_unless_finite_and_above_the_threshold():
    values = [-math.inf, -5.0, 0.0, 99.0, 100.0, math.inf, math.nan]
    gamma = clip_factor(torch.tensor(values), 100.0)
    assert gamma.tolist() == [1.0] * len(values)
    gamma = clip_factor(torch.tensor([100.00001, 200.0, 3e38]), 100.0)
    assert (gamma < 1).all()
    assert (gamma > 0).all()
    assert gamma[1].item() == 0.5


def test_number_of_clipped_heads():
    assert num_clipped(clip_factor(torch.tensor([1.0, 101.0, 300.0, math.inf]), 100.0)).item() == 2


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_threshold_must_be_positive(threshold):
    with pytest.raises(ValueError, match="threshold"):
        clip_factor(torch.ones(2), threshold)


def fused_qkv_logits(weight, x, num_groups, head_dim):
    """[h, s, s] of Megatron's fused layout, and the values [g, s, d]."""
    qkv = (x @ weight.T).unflatten(-1, (num_groups, -1, head_dim))  # [s, g, q per group + 2, d]
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    return torch.einsum("igqd,jgd->gqij", q, k).flatten(0, 1) / math.sqrt(head_dim), v


@pytest.mark.parametrize("mode", ["query", "group"])
@pytest.mark.parametrize(("num_heads", "num_groups"), [(8, 2), (4, 4)])
def test_fused_qkv_logits_scale_as_the_mode_says(num_heads, num_groups, mode):
    g = torch.Generator().manual_seed(0)
    dim, per_group = 8, num_heads // num_groups
    weight = torch.randn(num_groups * (per_group + 2) * dim, 20, generator=g, dtype=torch.float64)
    x = torch.randn(30, 20, generator=g, dtype=torch.float64)
    before, values = fused_qkv_logits(weight, x, num_groups, dim)
    largest = before.amax((1, 2))
    gamma = clip_factor(largest, largest.median().item())
    assert 0 < num_clipped(gamma) < num_heads
    scaled = weight.clone()
    scale = gqa_row_scale(gamma, num_groups, dim, 0.25, mode)
    scale_rows_(scaled.view(-1), scale, 20, 0, weight.numel())
    after, values_after = fused_qkv_logits(scaled, x, num_groups, dim)
    expected = gamma
    if mode == "group":
        expected = gamma.view(num_groups, -1).amin(1).repeat_interleave(per_group)
    torch.testing.assert_close(after, before * expected[:, None, None], rtol=1e-12, atol=1e-12)
    assert torch.equal(values, values_after)
    if mode == "query":
        assert torch.equal(before[gamma == 1], after[gamma == 1])


def test_multi_head_attention_splits_gamma_between_query_and_key():
    scale = gqa_row_scale(torch.tensor([0.25, 1.0]), 2, head_dim=1, mode="group").tolist()
    assert scale == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]


def test_heads_must_divide_into_groups():
    with pytest.raises(ValueError, match="num_query_groups=3"):
        gqa_row_scale(torch.ones(8), 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_cut_of_the_flat_weight_is_scaled_like_the_whole(dtype):
    """Every [start, end) of a 5 x 7 weight, empty and sub-row ones included."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=g).to(dtype)
    row_scale = torch.tensor([1.0, 0.3, 1.0, 0.7, 0.9])
    whole = (weight.float() * row_scale[:, None]).to(dtype).flatten()
    for start in range(36):
        for end in range(start, 36):
            shard = weight.flatten()[start:end].clone()
            scale_rows_(shard, row_scale, 7, start, end)
            assert torch.equal(shard, whole[start:end]), (start, end)


def test_a_shard_that_does_not_fit_is_refused_before_anything_is_scaled():
    shard = torch.ones(10)
    for start, end in ((0, 9), (-1, 9), (30, 40)):
        with pytest.raises(ValueError, match="shard"):
            scale_rows_(shard, torch.full((5,), 0.5), 7, start, end)
    assert torch.equal(shard, torch.ones(10))
