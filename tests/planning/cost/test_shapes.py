"""Shapes by arithmetic against a built model, and all ranks of the full one together."""

from dataclasses import replace

import pytest

from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.planning.cost.shapes import rank_weights
from megatron_k2.planning.schedule.chunks import split_into_chunks
from megatron_k2.presets import KIMI_K2
from tests.support.single_rank import SMALL, build, one_rank


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
    for chunk in split_into_chunks(61, 16, 2):
        ends = {"has_embedding": chunk.has_embedding, "has_head": chunk.has_head}
        weights = rank_weights(KIMI_K2, chunk.layers, tp=1, ep=16, **ends)
        for weight in weights:
            numel = 1
            for size in weight.shape:
                numel *= size
            total += numel * (16 if weight.is_expert else 1)
    assert total == count_parameters(KIMI_K2).trainable
