"""Shapes by arithmetic against a built model, and the layers of the stages."""

from dataclasses import replace

import pytest

from megatron_k2.planning.params import count_parameters
from megatron_k2.planning.shapes import rank_weights, stage_layers
from megatron_k2.presets import KIMI_K2
from tests.single_rank import SMALL, build, one_rank


@pytest.mark.parametrize("preset", [SMALL, replace(SMALL, q_lora_rank=None)], ids=["k2", "no q"])
def test_a_ranks_weights_are_those_of_a_built_model_in_its_order(preset):
    with one_rank():
        built = [
            (tuple(param.shape), "local_experts" in name)
            for name, param in build(preset).named_parameters()
        ]
    layers = range(preset.num_layers)
    found = rank_weights(preset, layers, tp=1, ep=1, has_embedding=True, has_head=True)
    assert [(weight.shape, weight.is_expert) for weight in found] == built


def test_all_ranks_of_k2_together_hold_every_weight_once():
    """TP1: the stages' dense weights, and EP times each rank's experts."""
    total = 0
    for stage, layers in enumerate(stage_layers(61, 16)):
        weights = rank_weights(
            KIMI_K2, layers, tp=1, ep=16, has_embedding=stage == 0, has_head=stage == 15
        )
        for weight in weights:
            numel = 1
            for size in weight.shape:
                numel *= size
            total += numel * (16 if weight.is_expert else 1)
    assert total == count_parameters(KIMI_K2).trainable


@pytest.mark.parametrize(("num_layers", "num_stages"), [(61, 16), (8, 4), (3, 3), (61, 1)])
def test_stages_cover_all_layers_in_order_and_differ_by_one_at_most(num_layers, num_stages):
    stages = stage_layers(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert len(stages) == num_stages
    assert max(sizes) - min(sizes) <= 1
