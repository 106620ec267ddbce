import dataclasses
import json
from argparse import Namespace

import pytest

from megatron_k2.checkpoint.hf.config import (
    generation_config,
    hf_config,
    preset_from_args,
    without_yarn,
)
from megatron_k2.errors import UserError
from megatron_k2.presets import K2_TINY, KIMI_K2, MOONLIGHT_16B_A3B, PRESETS
from tests.support.paths import SHARED

RELEASED = SHARED / "data/kimi-k2/config.json"


@pytest.mark.skipif(not RELEASED.exists(), reason="the released config.json is not at hand")
def test_kimi_k2_is_field_for_field_the_released_config():
    released = json.loads(RELEASED.read_text())
    del released["quantization_config"]
    assert hf_config(KIMI_K2) == released


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_transformers_reads_every_size_and_the_rotary_settings(preset, tmp_path):
    from transformers import AutoConfig

    config = hf_config(preset, model_type="deepseek_v3")
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.model_type == "deepseek_v3"
    for key in ("hidden_size", "q_lora_rank", "n_routed_experts", "routed_scaling_factor"):
        assert getattr(read, key) == config[key]
    assert read.rope_parameters["rope_theta"] == preset.rotary_base
    expected = "default" if preset.yarn is None else "yarn"
    assert read.rope_parameters["rope_type"] == expected


def test_code_files_of_the_release_are_named_only_for_its_own_model_type():
    assert "auto_map" in hf_config(K2_TINY)
    assert "auto_map" not in hf_config(K2_TINY, model_type="deepseek_v3")


def test_without_yarn_there_is_no_rope_scaling_and_the_original_context():
    config = hf_config(without_yarn(KIMI_K2))
    assert "rope_scaling" not in config
    assert config["max_position_embeddings"] == 4096


def test_an_unknown_model_type_is_refused():
    with pytest.raises(UserError, match="'llama' is not one of"):
        hf_config(K2_TINY, model_type="llama")


def test_generation_config_has_the_presets_tokens():
    assert generation_config(hf_config(KIMI_K2))["eos_token_id"] == 163585


def test_flags_of_the_run_override_the_preset():
    args = Namespace(
        num_layers=2,
        hidden_size=64,
        q_lora_rank=None,
        num_experts=8,
        moe_layer_freq=[0, 1],
        moe_ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=32,
        tokenizer_type="NullTokenizer",
        vocab_size=100,
        padded_vocab_size=128,
        rope_type="rope",
        max_position_embeddings=77,
        num_attention_heads=None,
    )
    expected = dataclasses.replace(
        K2_TINY,
        num_layers=2,
        hidden_size=64,
        q_lora_rank=None,
        num_moe_experts=8,
        moe_ffn_hidden_size=16,
        num_shared_experts=2,
        vocab_size=100,
        yarn=None,
        max_position_embeddings=77,
    )
    assert preset_from_args(args, K2_TINY) == expected


def test_args_that_say_nothing_leave_the_preset_as_it_is():
    assert preset_from_args(Namespace(), MOONLIGHT_16B_A3B) == MOONLIGHT_16B_A3B


def test_yarn_flags_are_read_back():
    args = Namespace(
        rope_type="yarn",
        rotary_scaling_factor=8.0,
        mscale=1.0,
        mscale_all_dim=0.5,
        yarn_mla_beta_fast=32.0,
        yarn_mla_original_max_position_embeddings=512,
    )
    preset = preset_from_args(args, K2_TINY)
    assert preset.max_position_embeddings == 4096
    assert hf_config(preset)["rope_scaling"] == {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 512,
        "type": "yarn",
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (Namespace(moe_layer_freq=[1, 0, 1]), "first_k_dense_replace"),
        (Namespace(moe_shared_expert_intermediate_size=65), "not a multiple"),
        (Namespace(latent_norm_epsilon=1e-5), "latent_norm_epsilon=1e-05"),
        (Namespace(vocab_size=200, padded_vocab_size=128), "exceeds padded_vocab_size"),
        (
            Namespace(rope_type="rope", rotary_scaling_factor=32.0, mscale_all_dim=1.0),
            "scaled the softmax",
        ),
    ],
    ids=["layer pattern", "shared width", "latent epsilon", "vocabulary", "softmax scale"],
)
def test_a_model_that_hugging_face_cannot_describe_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        preset_from_args(args, K2_TINY)
