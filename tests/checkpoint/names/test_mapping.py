import dataclasses
import itertools
import math

import pytest
import torch

from megatron_k2.checkpoint.names import mapping
from megatron_k2.errors import UserError
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.presets import K2_TINY, KIMI_K2, MOONLIGHT_16B_A3B, PRESETS

SMALL = dataclasses.replace(
    K2_TINY, num_layers=3, num_moe_experts=4, moe_router_topk=2, vocab_size=50, hidden_size=32
)
WITHOUT_Q_LORA = dataclasses.replace(SMALL, q_lora_rank=None)


def transformers_model(preset):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from megatron_k2.checkpoint.hf.config import hf_config

    config = hf_config(preset, model_type="deepseek_v3", dtype="fp32")
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config))


def random_hf_state(preset):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for pair in mapping.expand(preset)
        for name, shape in zip(pair.hf, pair.hf_shapes, strict=True)
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_rules_cover_exactly_the_parameters_of_every_preset(preset):
    elements = sum(math.prod(pair.megatron_shape) for pair in mapping.expand(preset))
    assert elements == count_parameters(preset).total


@pytest.mark.parametrize("preset", [SMALL, WITHOUT_Q_LORA], ids=["q_lora", "no_q_lora"])
def test_names_and_shapes_are_those_transformers_builds(preset):
    with torch.device("meta"):
        state = mapping.classic_from_transformers(transformers_model(preset).state_dict())
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    produced = {
        name: shape
        for pair in mapping.expand(preset)
        for name, shape in zip(pair.hf, pair.hf_shapes, strict=True)
    }
    assert produced == expected


@pytest.mark.parametrize("preset", [SMALL, WITHOUT_Q_LORA], ids=["q_lora", "no_q_lora"])
def test_there_and_back_is_bit_for_bit_the_same(preset):
    hf_state = random_hf_state(preset)
    megatron_state = mapping.hf_state_to_megatron(hf_state, preset)
    assert_same(mapping.megatron_state_to_hf(megatron_state, preset), hf_state)


def test_gate_lies_above_up_in_the_fused_weight():
    hf_state = random_hf_state(SMALL)
    fused = mapping.hf_state_to_megatron(hf_state, SMALL)[
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    ]
    width, expert = SMALL.moe_ffn_hidden_size, "model.layers.1.mlp.experts.3."
    assert torch.equal(fused[:width], hf_state[f"{expert}gate_proj.weight"])
    assert torch.equal(fused[width:], hf_state[f"{expert}up_proj.weight"])


def test_a_table_with_up_above_gate_is_seen_by_the_round_trip_through_the_right_one(monkeypatch):
    hf_state = random_hf_state(SMALL)
    right = mapping.hf_state_to_megatron(hf_state, SMALL)
    swapped = tuple(dataclasses.replace(rule, hf=rule.hf[::-1]) for rule in mapping.RULES)
    monkeypatch.setattr(mapping.expand, "__defaults__", (swapped,))
    wrong = mapping.hf_state_to_megatron(hf_state, SMALL)
    different = {name for name in right if not torch.equal(right[name], wrong[name])}
    assert different == {name for name in right if "linear_fc1" in name}


def test_vocabulary_padding_is_added_on_the_way_in_and_cut_on_the_way_out():
    hf_state = random_hf_state(SMALL)
    megatron_state = mapping.hf_state_to_megatron(hf_state, SMALL, padded_vocab_size=64)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert megatron_state[name].shape == (64, SMALL.hidden_size)
        assert not megatron_state[name][SMALL.vocab_size :].any()
    assert_same(mapping.megatron_state_to_hf(megatron_state, SMALL), hf_state)


def test_fused_experts_of_transformers_come_apart_as_they_do_on_disk(tmp_path):
    from safetensors.torch import load_file

    model = transformers_model(SMALL)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    in_memory = mapping.classic_from_transformers(model.state_dict())
    assert_same(in_memory, on_disk)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "no 'model.norm.weight'"),
        (lambda s: s.update(extra=torch.ones(1)), "no place in the preset: extra"),
        (lambda s: s.update({"model.norm.weight": torch.ones(3)}), "expects \\[32\\]"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_a_state_that_does_not_fit_is_refused_by_name(change, message):
    hf_state = random_hf_state(SMALL)
    change(hf_state)
    with pytest.raises(UserError, match=message):
        mapping.hf_state_to_megatron(hf_state, SMALL)


def test_leftover_rotary_buffers_of_a_release_are_passed_over():
    hf_state = random_hf_state(SMALL)
    expected = mapping.hf_state_to_megatron(hf_state, SMALL)
    leftover = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(56)}
    assert_same(mapping.hf_state_to_megatron(hf_state | leftover, SMALL), expected)
    # only these: another buffer of the same module has no rule and is refused
    other = {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(56)}
    with pytest.raises(UserError, match=r"no place in the preset: .*cos_cached"):
        mapping.hf_state_to_megatron(hf_state | other, SMALL)


def test_only_the_router_selection_bias_is_kept_in_fp32():
    assert [rule.hf[0].split(".")[-1] for rule in mapping.RULES if rule.is_fp32] == [
        "e_score_correction_bias"
    ]


def test_embedding_travels_with_the_first_layer_and_the_head_with_the_last():
    at = {name: pair.layer for pair in mapping.expand(KIMI_K2) for name in pair.hf}
    assert at["model.embed_tokens.weight"] == 0
    assert at["model.norm.weight"] == at["lm_head.weight"] == 60


@pytest.mark.parametrize("preset", [KIMI_K2, MOONLIGHT_16B_A3B], ids=lambda p: p.name)
def test_layers_come_in_order_so_that_a_shard_is_one_run(preset):
    layers = [layer for layer, _ in itertools.groupby(mapping.expand(preset), lambda p: p.layer)]
    assert layers == list(range(preset.num_layers))
