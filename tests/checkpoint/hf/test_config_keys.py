"""Every key of a config.json is used, harmless or refused, in agreement with transformers."""

import math

import pytest

from megatron_k2.checkpoint.hf.config import hf_config, without_yarn
from megatron_k2.checkpoint.hf.preset import preset_from_hf
from megatron_k2.errors import UserError
from megatron_k2.presets import K2_TINY

CLASSIC = hf_config(K2_TINY, model_type="deepseek_v3")
YARN = CLASSIC["rope_scaling"]
ABSENT = object()


def changed(**keys):
    return {key: value for key, value in (CLASSIC | keys).items() if value is not ABSENT}


def scaling(**keys):
    changed = {key: value for key, value in (YARN | keys).items() if value is not ABSENT}
    return {"rope_scaling": changed}


def modern(**keys):
    named = {"rope_type" if key == "type" else key: value for key, value in YARN.items()}
    return {"rope_parameters": named | {"rope_theta": CLASSIC["rope_theta"]} | keys}


REFUSED = [
    ({"rope_interleave": None}, "rope_interleave=None"),
    ({"mlp_bias": True}, "mlp_bias=True, supported is False"),
    ({"use_qk_norm": True}, "use_qk_norm=True"),
    ({"swiglu_limit": 7.0}, "swiglu_limit=7.0 is no key"),
    ({"sliding_window": 128}, "sliding_window=128 is no key"),
    ({"sliding_window": 128, "use_sliding_window": True}, "use_sliding_window=True"),
    ({"index_topk": 2048}, "index_topk=2048 is no key"),
    ({"attention_sink": True}, "attention_sink=True is no key"),
    ({"is_causal": False}, "is_causal=False is no key"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"num_key_value_heads": 2}, "num_key_value_heads=2, supported is 4"),
    ({"head_dim": 32}, "head_dim=32, supported is 16"),
    ({"qk_head_dim": 16}, "qk_head_dim=16, supported is 48"),
    ({"layer_types": ["sliding_attention"] * 4}, "layer_types="),
    ({"mlp_layer_types": ["sparse"] * 4}, "mlp_layer_types="),
    ({"moe_layer_freq": [0, 1, 1, 1]}, "moe_layer_freq="),
    ({"num_mtp_layers": 1}, "num_mtp_layers=1 and num_nextn_predict_layers=0 .* differ"),
    ({"num_local_experts": 16}, "num_local_experts=16 and n_routed_experts=32"),
    # sizes that no model has
    ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15; .* even"),
    ({"num_experts_per_tok": 64}, "num_experts_per_tok=64 exceeds n_routed_experts=32"),
    ({"first_k_dense_replace": 9}, "first_k_dense_replace=9 exceeds num_hidden_layers=4"),
    ({"hidden_size": 128.0}, "hidden_size=128.0, expected a positive number written without"),
    ({"hidden_size": True}, "hidden_size=True"),
    ({"num_nextn_predict_layers": 10**9}, "1000000004 layers .* more than any model has"),
    ({"num_hidden_layers": 10**9}, "layers .* more than any model has"),
    ({"n_shared_experts": None}, "n_shared_experts=None"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps=inf"),
    ({"num_nextn_predict_layers": 0.5}, "num_nextn_predict_layers=0.5, expected a whole"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
    ({"eos_token_id": True}, "eos_token_id=True"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id="),
    ({"aux_loss_alpha": "0.001"}, "aux_loss_alpha='0.001'"),
    # groups of experts
    ({"n_group": ABSENT}, "lacks n_group; transformers takes 8"),
    ({"n_group": 8, "topk_group": ABSENT}, "n_group=8, topk_group=None"),
    ({"n_group": 8, "topk_group": None}, "n_group=8, topk_group=None"),
    ({"n_group": 2, "topk_group": 3}, "topk_group=3; .* at most"),
    ({"n_group": 3, "topk_group": 2}, "do not fit n_routed_experts=32"),
    ({"n_group": 16, "topk_group": 1}, "do not fit .*num_experts_per_tok=4"),
    ({"n_group": 8, "topk_group": 4}, "best 1 experts .* Hugging Face by two"),
    # rotary
    ({"rope_theta": "50000"}, "rope_theta='50000', expected a number"),
    ({"rope_theta": math.nan}, "rope_theta=nan"),
    (scaling(attention_factor=1.3), r"rope_scaling.attention_factor=1.3 .*\(1\)"),
    (scaling(attention_factor="1"), "rope_scaling.attention_factor='1', expected a number"),
    (scaling(truncate=False), "rope_scaling.truncate=False is not supported"),
    (scaling(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor=0.5"),
    (scaling(short_factor=[1.0]), r"rope_scaling.short_factor=\[1.0\]"),
    (scaling(type="deepseek_yarn"), "of type 'deepseek_yarn'"),
    (scaling(rope_type="linear"), "of type 'linear and yarn'"),
    (scaling(type=1), "expected a type in words"),
    (scaling(factor=None), "rope_scaling lacks factor"),
    (scaling(factor="x"), "rope_scaling.factor='x', expected a number"),
    (scaling(factor=0.5), "rope_scaling.factor=0.5"),
    (scaling(beta_fast=[1]), r"rope_scaling.beta_fast=\[1\], expected a number"),
    (scaling(beta_fast=0), "beta_fast and beta_slow above 0"),
    (scaling(mscale=0.707, mscale_all_dim=ABSENT), "by which transformers scales by 1.277"),
    (scaling(original_max_position_embeddings=256.5), "original_max_position_embeddings=256.5"),
    ({"original_max_position_embeddings": 512}, "original_max_position_embeddings=512 and that"),
    ({"rope_parameters": [1]}, r"rope_parameters=\[1\], expected an object"),
    ({"rope_parameters": "yarn"}, "rope_parameters='yarn', expected an object"),
    (
        {"rope_scaling": ABSENT, "rope_parameters": {"full_attention": YARN}},
        "own for full_attention",
    ),
    (
        modern(rope_theta=10000.0),
        "rope_theta=50000 and .*rope_theta=10000 contradict",
    ),
    (modern(factor=64.0), "rope_scaling=.* and rope_parameters=.* contradict"),
    ({"rope_scaling": {"type": "default", "mscale_all_dim": 1.0}}, "mscale_all_dim=1.0"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_a_key_that_changes_the_computation_is_refused_by_name(keys, message):
    with pytest.raises(UserError, match=message):
        preset_from_hf(changed(**keys))


TAKEN = {
    "transformers' aliases": {"num_mtp_layers": 0, "num_local_experts": 32},
    "what repeats others": {
        "head_dim": 16,
        "qk_head_dim": 48,
        "layer_types": ["full_attention"] * 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "a window that is off": {"use_sliding_window": False, "sliding_window": 4096},
    "a key that says nothing": {"sliding_window": None, "index_topk": None, "pruned_heads": {}},
    "no groups": {"n_group": None, "topk_group": None},
    "all groups": {"n_group": 4, "topk_group": 4},
    "the factor that is computed": scaling(attention_factor=1.0),
    "as transformers does anyway": scaling(truncate=True, beta_slow=None, finetuned=True),
    "both spellings": modern(),
    "the base in rope_parameters": {"rope_theta": None} | modern(),
    "the base alone in rope_parameters": {"rope_parameters": {"rope_theta": 50000}},
    "the original length twice": {"original_max_position_embeddings": 256},
}


@pytest.mark.parametrize("keys", TAKEN.values(), ids=TAKEN)
def test_keys_that_change_nothing_give_the_same_preset(keys):
    assert preset_from_hf(changed(**keys)) == K2_TINY


@pytest.mark.parametrize("preset", [K2_TINY, without_yarn(K2_TINY)], ids=["yarn", "plain"])
def test_whatever_transformers_writes_is_taken(preset):
    """Every field of its configuration and base class, at the values of this model."""
    from transformers import DeepseekV3Config

    written = DeepseekV3Config(**hf_config(preset, model_type="deepseek_v3")).to_dict()
    assert len(written) > 40
    assert preset_from_hf(written) == preset


@pytest.mark.parametrize("mscale", [ABSENT, None, 0, 0.707, 1.0])
@pytest.mark.parametrize("all_dim", [ABSENT, None, 0, 0.707, 1.0])
def test_yarn_is_taken_where_transformers_and_megatron_scale_alike_and_only_there(mscale, all_dim):
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor,
    )
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = changed(**scaling(mscale=mscale, mscale_all_dim=all_dim))
    theirs = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**config))[1]
    given = [
        default if value in (ABSENT, None) else value
        for value, default in ((mscale, 1.0), (all_dim, 0.0))
    ]
    ours = _yarn_get_concentration_factor(YARN["factor"], *given)
    if math.isclose(theirs, ours, rel_tol=1e-9):
        yarn = preset_from_hf(config).yarn
        assert [yarn.mscale, yarn.mscale_all_dim] == given
    else:
        with pytest.raises(UserError, match="is not what Megatron computes"):
            preset_from_hf(config)
