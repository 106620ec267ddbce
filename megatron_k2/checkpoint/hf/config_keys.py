"""Every key of a ``config.json``: used, harmless, or refused by name.

The lists to go by are transformers 5's ``DeepseekV3Config`` with its base class, and the
``configuration_deepseek.py`` of the releases of Kimi K2 and DeepSeek-V3. Both let any other key
pass, and their models ignore it; yet whoever wrote ``swiglu_limit`` or ``index_topk`` meant another
computation. So a key that stands in none of the lists below is refused.
"""

from typing import Any

from megatron_k2.errors import UserError

ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
"""Names of transformers 5 -> the releases' own."""

_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "moe_layer_freq": (1,),
    "norm_topk_prob": (True,),
    "scoring_func": ("sigmoid",),
    "tie_word_embeddings": (False,),
    "topk_method": ("noaux_tc",),
    "model_type": ("kimi_k2", "deepseek_v3"),
    "rope_interleave": (True, False),  # rows in halves are brought into pairs
    # not of these models; where they say nothing, they are let pass
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
}
"""Values the rules and the model code stand for; an absent key means the first."""

_REASONS = {
    "head_dim": "it is qk_rope_head_dim by another name; leave it out",
    "qk_head_dim": "it is qk_nope_head_dim + qk_rope_head_dim; leave it out",
}

_USED = {
    "aux_loss_alpha",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "n_group",
    "num_nextn_predict_layers",
    "original_max_position_embeddings",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "topk_group",
    "torch_dtype",
}
"""Read where they belong, besides the shape's own keys; or kept for the export."""

_HARMLESS = set(
    # how it is run, trained or named
    """
    _attn_implementation _attn_implementation_autoset _experts_implementation _name_or_path
    architectures attention_dropout auto_map ep_size ignore_keys_at_rope_validation
    output_attentions output_hidden_states output_router_logits pretraining_tp return_dict
    router_aux_loss_coef seq_aux transformers_version transformers.js_config unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()
    # of transformers' base class, read by other models or for other tasks
    + """
    chunk_size_feed_forward cross_attention_hidden_size custom_pipelines finetuning_task
    id2label is_decoder label2id problem_type tf_legacy_loss torchscript
    task_specific_params
    """.split()
    # ids and words of the tokenizer, and what generation_config.json says nowadays
    + """
    decoder_start_token_id pad_token_id sep_token_id tokenizer_class prefix bad_words_ids
    begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    temperature top_k top_p typical_p
    """.split()
)
"""Kept, and of no consequence for what a given model computes."""

_ABSENT_MEANS_GROUPS = 8
"""``n_group`` where a file does not say it, in transformers and in the releases' code."""


def with_own_names(config: dict[str, Any]) -> dict[str, Any]:
    """The config with transformers' aliases under the releases' names.

    Raises:
        UserError: if both names are there and disagree.
    """
    result = {key: value for key, value in config.items() if key not in ALIASES}
    for alias, name in ALIASES.items():
        if alias in config and result.setdefault(name, config[alias]) != config[alias]:
            raise UserError(
                f"config.json: {alias}={config[alias]!r} and {name}={config[name]!r} are the same "
                "thing and differ; leave the wrong one out"
            )
    return result


def require_known_keys(config: dict[str, Any], shape: dict[str, Any]) -> None:
    """Refuse whatever may change the computation and is not carried out.

    Args:
        config: content of ``config.json``, with its own names.
        shape: of it, the keys that make up the preset's shape; already checked to be numbers.

    Raises:
        UserError: naming the key, its value, and what is supported.
    """
    for key, known in (_VALUES | _derived(shape)).items():
        if config.get(key, known[0]) not in known:
            expected = " or ".join(repr(value) for value in known)
            raise UserError(
                f"config.json: {key}={config[key]!r}, supported is {expected}; "
                + _REASONS.get(key, "a model of another kind cannot be converted")
            )
    has_window = "use_sliding_window" not in config
    listed = _VALUES.keys() | _derived(shape).keys() | _USED | _HARMLESS | shape.keys()
    for key, value in config.items():
        says_nothing = value is None or value in ({}, [], "")
        is_off = key in ("sliding_window", "max_window_layers") and not has_window
        if key not in listed and not says_nothing and not is_off:
            raise UserError(
                f"config.json: {key}={value!r} is no key of DeepSeek-V3's or Kimi K2's model and "
                "may change what it computes, which is not supported; if it changes nothing, leave "
                "it out of config.json"
            )


def _derived(shape: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Keys that repeat others, as transformers writes them, and the values they may have."""
    layers, dense = shape["num_hidden_layers"], shape["first_k_dense_replace"]
    rotary = shape["qk_rope_head_dim"]
    return {
        "num_key_value_heads": (shape["num_attention_heads"], None),
        "head_dim": (rotary, None),
        "qk_head_dim": (shape["qk_nope_head_dim"] + rotary, None),
        "layer_types": (["full_attention"] * layers, None),
        "mlp_layer_types": (["dense"] * dense + ["sparse"] * (layers - dense), None),
    }


def expert_groups(config: dict[str, Any]) -> tuple[int, int]:
    """Groups that experts are in and how many of them a token may use; (1, 1): no groups.

    Raises:
        UserError: if they cannot be had, or Megatron 0.19.2 would choose otherwise: it ranks groups
            by their best ``topk // topk_group`` experts (``moe_utils.py:656``), Hugging Face by
            their best two.
    """
    if "n_group" not in config:
        raise UserError(
            f"config.json lacks n_group; transformers takes {_ABSENT_MEANS_GROUPS} groups of "
            "experts then. Say it: 1 is Kimi K2's, which has no groups"
        )
    groups, chosen = config["n_group"], config.get("topk_group")
    experts, topk = config["n_routed_experts"], config["num_experts_per_tok"]
    if groups in (None, 1) and chosen in (None, 1):
        return 1, 1
    said = f"config.json: n_group={groups!r}, topk_group={chosen!r}"
    if not (type(groups) is int and type(chosen) is int and 0 < chosen <= groups):
        raise UserError(f"{said}; expected whole numbers, topk_group at most n_group")
    if experts % groups or experts // groups < 2 or topk > experts // groups * chosen:
        raise UserError(
            f"{said} do not fit n_routed_experts={experts}, num_experts_per_tok={topk}: groups "
            "must be equal, of two experts at least, and the chosen ones have enough experts"
        )
    if chosen < groups and topk // chosen != 2:
        raise UserError(
            f"{said} with num_experts_per_tok={topk}: Megatron ranks groups by their best "
            f"{topk // chosen} experts (num_experts_per_tok / topk_group), Hugging Face by two"
        )
    return groups, chosen
