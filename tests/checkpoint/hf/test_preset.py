import json

import pytest

from megatron_k2.checkpoint.hf.config import hf_config, without_yarn
from megatron_k2.checkpoint.hf.preset import config_like, preset_from_hf
from megatron_k2.errors import UserError
from megatron_k2.presets import K2_TINY, KIMI_K2, PRESETS
from tests.support.paths import SHARED

RELEASED = SHARED / "data" / "kimi-k2" / "config.json"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_a_preset_comes_back_from_its_config(preset):
    assert preset_from_hf(hf_config(preset)) == preset


@pytest.mark.skipif(not RELEASED.is_file(), reason="the released config.json is not here")
def test_the_released_config_is_the_preset_and_survives_as_template():
    released = json.loads(RELEASED.read_text())
    assert preset_from_hf(released) == KIMI_K2
    again = config_like(released, KIMI_K2, model_type=None, dtype="bf16")
    assert again == {k: v for k, v in released.items() if k != "quantization_config"}


def test_rope_parameters_of_transformers_5_say_the_same():
    classic = hf_config(K2_TINY)
    scaling = dict(classic.pop("rope_scaling"))
    scaling["rope_type"] = scaling.pop("type")
    modern = classic | {"rope_parameters": scaling | {"rope_theta": classic.pop("rope_theta")}}
    assert preset_from_hf(modern) == K2_TINY
    assert config_like(modern, K2_TINY, model_type=None, dtype="bf16") == hf_config(K2_TINY)


def test_an_export_says_what_the_run_did_and_keeps_the_rest():
    template = hf_config(K2_TINY) | {"ep_size": 1, "torch_dtype": "float16"}
    config = config_like(template, without_yarn(K2_TINY), model_type="deepseek_v3", dtype="fp32")
    assert "rope_scaling" not in config
    assert "auto_map" not in config
    assert (config["ep_size"], config["torch_dtype"]) == (1, "float32")
    assert config["max_position_embeddings"] == K2_TINY.yarn.original_max_position_embeddings


def test_a_template_of_another_model_is_refused():
    with pytest.raises(UserError, match="hidden_size=7168, the checkpoint 128"):
        config_like(hf_config(KIMI_K2), K2_TINY, model_type=None, dtype="bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": None}, "neither rope_theta nor rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "lacks original_max_position"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ({"num_experts_per_tok": 1}, "does not normalise the weight of a single expert"),
        ({"num_attention_heads": 3}, "does not divide by num_attention_heads=3"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"model_type": "llama"}, "model_type='llama'"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    config = hf_config(K2_TINY) | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(UserError, match=message):
        preset_from_hf(config)


def test_a_config_of_another_family_names_what_it_lacks():
    with pytest.raises(UserError, match=r"lacks .*kv_lora_rank"):
        preset_from_hf({"hidden_size": 8})
