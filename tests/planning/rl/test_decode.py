"""Seconds of a decode step and of reading, by hand from the data sheet."""

import pytest

from megatron_k2.planning.cost.flops import model_flops_per_token
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.planning.estimate import Assumptions
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.rl.decode import LAYER_SECONDS, replica
from megatron_k2.planning.rl.memory import engine_weights
from megatron_k2.planning.rl.request import EngineLayout
from megatron_k2.presets import KIMI_K2

A = Assumptions(hbm=0.5, grouped=0.5, attention=0.25, network=0.5)
H800 = get_gpu("h800")
ENGINES = EngineLayout(1, 4, slots=256)


def _rates(engines=ENGINES):
    return replica(KIMI_K2, H800, engines, A)


def test_one_answer_reads_what_every_token_needs_and_its_experts():
    weights = engine_weights(KIMI_K2, ENGINES)
    read = weights.whole + 8 / 384 * weights.experts + 1000 / 32 * 70_272
    assert _rates().read_seconds(1, 1000) == pytest.approx(read / (0.5 * 3350e9))


def test_many_answers_read_every_expert_once():
    weights = engine_weights(KIMI_K2, ENGINES).total
    assert _rates().read_seconds(10_000, 0) == pytest.approx(weights / (0.5 * 3350e9))


def test_products_are_all_linears_and_attention_over_latents():
    linears = 2 * 64 * count_parameters(KIMI_K2).activated / (0.5 * 1979e12)
    attention = 2 * 64_000 * 61 * 64 * (2 * 512 + 64) / (0.25 * 989e12)
    assert _rates().flops_seconds(64, 64_000) == pytest.approx((linears + attention) / 32)


def test_a_token_goes_to_each_of_its_experts_and_back_over_the_network():
    copies = 64 / 32 * 8 * 7168 * (1 + 2) * 31 / 32
    assert _rates().sent_seconds(64) == pytest.approx(60 * copies / (0.5 * 50e9))
    in_a_node = _rates(EngineLayout(1, 1, slots=8))
    copies = 64 / 8 * 8 * 7168 * (1 + 2) * 7 / 8
    assert in_a_node.sent_seconds(64) == pytest.approx(60 * copies / (0.5 * 200e9))


def test_a_step_is_the_slower_of_memory_and_products_and_what_is_sent():
    rates = _rates()
    for answers, held in ((8, 10_000), (40_000, 4_000_000)):
        parts = rates.read_seconds(answers, held), rates.flops_seconds(answers, held)
        sent = rates.sent_seconds(answers) + 61 * LAYER_SECONDS
        assert rates.step_seconds(answers, held) == pytest.approx(max(parts) + sent)
    assert parts[1] > parts[0], "so many answers are bound by products"


def test_reading_is_a_forward_pass():
    flops = 5000 * model_flops_per_token(KIMI_K2, 3000) / 3
    expected = flops / (32 * 0.5 * 1979e12) + _rates().sent_seconds(5000)
    assert _rates().prompt_seconds(5000, 3000) == pytest.approx(expected, rel=1e-3)
