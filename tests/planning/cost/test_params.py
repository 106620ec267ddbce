"""The closed form against the published total and against models that Megatron really built."""

from dataclasses import replace

import pytest

from megatron_k2.model.moe import routers
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.presets import K2_TINY, KIMI_K2, MOONLIGHT_16B_A3B
from tests.support.single_rank import SMALL, build, one_rank

BUILT = {
    "k2_tiny": K2_TINY,
    "small": SMALL,
    "no_q_latent": replace(SMALL, q_lora_rank=None),
    "two_shared_experts": replace(SMALL, num_shared_experts=2, q_lora_rank=None),
    "two_dense_layers": replace(SMALL, num_layers=4, num_dense_layers=2),
    "no_dense_layer": replace(SMALL, num_dense_layers=0, v_head_dim=20, num_moe_experts=4),
}


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


def _built_counts(preset):
    model = build(preset)
    trainable = sum(p.numel() for p in model.parameters())
    biases = sum(router.expert_bias.numel() for router in routers([model]))
    return trainable, biases


def test_kimi_k2_has_the_parameters_its_checkpoint_has():
    """The sums over the released safetensors' shapes: 1.026T in all, 60 x 384 of them biases."""
    count = count_parameters(KIMI_K2)
    assert count.trainable == 1_026_408_209_408
    assert count.router_biases == 60 * 384
    assert count.total == 1_026_408_232_448


def test_activated_parameters_are_the_published_ones():
    """K2: 32.6B (report, table 2), which no sum over its config gives exactly; 1 % is near enough.

    Moonlight (arXiv:2502.16982, table 5): 2.24B of 15.29B, both without the two embeddings.
    """
    assert count_parameters(KIMI_K2).activated_with_embedding == pytest.approx(32.6e9, rel=0.01)
    moonlight = count_parameters(MOONLIGHT_16B_A3B)
    assert round((moonlight.activated - moonlight.embedding) / 1e9, 2) == 2.24
    assert round((moonlight.trainable - 2 * moonlight.embedding) / 1e9, 2) == 15.29


@pytest.mark.parametrize("name", BUILT)
def test_the_closed_form_equals_the_built_model(name):
    count = count_parameters(BUILT[name])
    assert (count.trainable, count.router_biases) == _built_counts(BUILT[name])


def test_activated_and_idle_experts_make_the_whole_model():
    count = count_parameters(K2_TINY)
    idle = K2_TINY.num_moe_layers * (K2_TINY.num_moe_experts - K2_TINY.moe_router_topk)
    assert count.activated_with_embedding + idle * count.expert == count.trainable


def test_a_count_that_forgets_the_latent_norms_would_be_seen():
    """The smallest mistake a formula can make here: one vector of one layer."""
    trainable, _ = _built_counts(SMALL)
    forgotten = SMALL.num_layers * (SMALL.q_lora_rank + SMALL.kv_lora_rank)
    assert count_parameters(SMALL).trainable - forgotten != trainable
    without_latent = replace(SMALL, q_lora_rank=None)
    assert count_parameters(without_latent).trainable != trainable
