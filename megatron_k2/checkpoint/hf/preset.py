"""``config.json`` -> preset: the inverse of ``config``, and what a template lends an export.

Every key is used, known to be harmless (``config_keys``), or refused by name: what Megatron cannot
be told is never passed over.
"""

import dataclasses
from typing import Any

from megatron_k2.checkpoint.hf.config import hf_config, require_normalised_choice
from megatron_k2.checkpoint.hf.config_keys import (
    expert_groups,
    require_known_keys,
    with_own_names,
)
from megatron_k2.checkpoint.hf.positions import rotary_positions
from megatron_k2.checkpoint.hf.quantization import require_known
from megatron_k2.errors import UserError
from megatron_k2.presets import PRESETS, ModelPreset, YarnScaling, get_preset

_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "first_k_dense_replace": "num_dense_layers",
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "n_shared_experts": "num_shared_experts",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
}
"""Key of ``config.json`` -> field of the preset; all are required."""

_FRACTIONS = ("routed_scaling_factor", "rms_norm_eps")
"""Of them, those that need not be whole."""

_LARGEST = 10**15
_MOST_EXPERTS = 10**6
"""Of all layers."""

_OPTIONAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "initializer_range": "init_method_std",
    "aux_loss_alpha": "moe_aux_loss_coeff",
    "num_nextn_predict_layers": "num_mtp_layers",
}

MODEL_KEYS = frozenset(_FIELDS) - {"max_position_embeddings"}
"""What a template's ``config.json`` must agree on with the checkpoint it is used for."""

_STATED_BY_RUN = (*sorted(MODEL_KEYS), "num_nextn_predict_layers")
"""Keys an export writes from the checkpoint even if its template says otherwise, besides positions
and dtype."""


def preset_from_hf(config: dict[str, Any], base_name: str | None = None) -> ModelPreset:
    """The shape a ``config.json`` describes.

    Args:
        config: its content.
        base_name: preset whose name and training defaults the result has. Default: the one of
            the same shape, else ``kimi-k2``.

    Raises:
        UserError: naming the key that is missing or says what is not supported.
    """
    config = with_own_names(config)
    if missing := [key for key in _FIELDS if key not in config]:
        raise UserError(f"config.json lacks {', '.join(missing)}: not a DeepSeek-V3 class model")
    _require_numbers(config)
    _require_sizes_that_fit(config)
    fields: dict[str, Any] = {field: config[key] for key, field in _FIELDS.items()}
    fields |= _optional_fields(config)
    _require_a_model_of_this_world(fields)
    require_known_keys(config, {key: config[key] for key in _FIELDS})
    require_normalised_choice(config["num_experts_per_tok"])
    expert_groups(config)
    require_known(config.get("quantization_config"))
    fields["rotary_base"], fields["yarn"] = rotary_positions(config)
    base = get_preset(base_name) if base_name else _same_shape(fields)
    return dataclasses.replace(base, **fields)


def _require_numbers(config: dict[str, Any]) -> None:
    for key in _FIELDS:
        value = config[key]
        is_absent = value is None and key == "q_lora_rank"
        is_none_dense = value == 0 and key == "first_k_dense_replace"
        if is_absent or (_is_number(value, key in _FRACTIONS) and (value > 0 or is_none_dense)):
            continue
        raise UserError(
            f"config.json: {key}={value!r}, expected a positive number"
            + ("" if key in _FRACTIONS else " written without a point")
        )


def _is_number(value: Any, may_be_fraction: bool) -> bool:
    """A number of JSON that a model may have: no truth value, infinity or NaN."""
    kinds = (int, float) if may_be_fraction else (int,)
    return type(value) in kinds and abs(value) <= _LARGEST  # NaN is not either


def _require_sizes_that_fit(config: dict[str, Any]) -> None:
    """What no single key shows."""
    c = config
    if c["hidden_size"] % c["num_attention_heads"]:
        raise UserError(
            f"config.json: hidden_size={c['hidden_size']} does not divide by "
            f"num_attention_heads={c['num_attention_heads']}, which Megatron demands"
        )
    if c["qk_rope_head_dim"] % 2:
        raise UserError(
            f"config.json: qk_rope_head_dim={c['qk_rope_head_dim']}; rotary embedding turns pairs, "
            "expected an even number"
        )
    for key, limit in (
        ("num_experts_per_tok", "n_routed_experts"),
        ("first_k_dense_replace", "num_hidden_layers"),
    ):
        if c[key] > c[limit]:
            raise UserError(
                f"config.json: {key}={c[key]} exceeds {limit}={c[limit]}; take the release's own"
            )


def _require_a_model_of_this_world(fields: dict[str, Any]) -> None:
    """A slip of digits must not cost minutes and memory before it is seen."""
    layers = fields["num_layers"] + fields.get("num_mtp_layers", 0)
    if layers * fields["num_moe_experts"] > _MOST_EXPERTS:
        raise UserError(
            f"config.json: {layers} layers (num_hidden_layers and num_nextn_predict_layers) of "
            f"n_routed_experts={fields['num_moe_experts']} are more than any model has; take the "
            "release's own"
        )


def _optional_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the preset from keys that a file may leave out, or say by null."""
    fields: dict[str, Any] = {}
    for key, field in _OPTIONAL.items():
        value = config.get(key)
        if key == "eos_token_id" and isinstance(value, list) and value:
            value = value[0] if all(_is_number(one, False) for one in value) else value
        if value is None:
            continue
        is_fraction = key in ("initializer_range", "aux_loss_alpha")
        if not _is_number(value, is_fraction) or value < 0:
            kind = "a number of 0 or more" if is_fraction else "a whole number of 0 or more"
            raise UserError(f"config.json: {key}={config[key]!r}, expected {kind}")
        fields[field] = value
    return fields


def _same_shape(fields: dict[str, Any]) -> ModelPreset:
    shape = [_FIELDS[key] for key in sorted(MODEL_KEYS)]
    for preset in PRESETS.values():
        if all(getattr(preset, name) == fields[name] for name in shape):
            return preset
    return PRESETS["kimi-k2"]


def config_like(
    template: dict[str, Any], preset: ModelPreset, *, model_type: str | None, dtype: str
) -> dict[str, Any]:
    """``template`` with every field it has, changed only where the checkpoint says otherwise.

    Args:
        template: ``config.json`` the weights came from.
        preset: of the checkpoint.
        model_type: replaces the template's; None keeps it.
        dtype: of the weights, ``bf16`` or ``fp32``.

    Raises:
        UserError: if the template is of another model.
    """
    template = with_own_names(template)
    kept_type = model_type or template.get("model_type", "kimi_k2")
    stated = hf_config(preset, model_type=kept_type, dtype=dtype)
    for key in sorted(MODEL_KEYS & template.keys()):
        if template[key] != stated[key]:
            raise UserError(
                f"the source's config.json says {key}={template[key]}, the checkpoint "
                f"{stated[key]}: not the model these weights came from; leave out --source"
            )
    config = dict(template)
    for key in _STATED_BY_RUN:
        if (template.get(key) or 0) != (stated[key] or 0):
            config[key] = stated[key]
    for key in {"torch_dtype", "dtype"} & template.keys() or {"torch_dtype"}:
        config[key] = stated["torch_dtype"]
    config = _with_positions(config, preset, stated)
    config.pop("quantization_config", None)
    if "rope_interleave" in config:
        config["rope_interleave"] = True  # rows that lay in halves were brought into pairs
    config["model_type"] = kept_type
    if model_type == "deepseek_v3":
        config.pop("auto_map", None)
    return config


def _with_positions(
    template: dict[str, Any], preset: ModelPreset, stated: dict[str, Any]
) -> dict[str, Any]:
    """The template's rotary keys and longest context, unless the run had others.

    A run's arguments say the length it was trained at, which may be shorter than what the model
    takes, and YaRN's factor, which a source need not have used up: neither makes another model.
    """
    config = {"max_position_embeddings": stated["max_position_embeddings"]} | template
    is_same = _positions_of(template) == (preset.rotary_base, preset.yarn)
    if not is_same:
        config["rope_scaling"] = stated.get("rope_scaling")
        config["max_position_embeddings"] = stated["max_position_embeddings"]
        config.pop("original_max_position_embeddings", None)
    elif preset.yarn is None:
        said, trained_at = template.get("max_position_embeddings"), preset.max_position_embeddings
        config["max_position_embeddings"] = max(said if type(said) is int else 0, trained_at)
    if config.pop("rope_parameters", None) is not None or not is_same:  # said in classic keys
        config["rope_theta"] = stated["rope_theta"]
        config["rope_scaling"] = config.get("rope_scaling") or stated.get("rope_scaling")
    if config.get("rope_scaling") is None and "rope_scaling" in config:
        del config["rope_scaling"]
    return config


def _positions_of(config: dict[str, Any]) -> tuple[float, YarnScaling | None] | None:
    try:
        return rotary_positions(config)
    except UserError:  # of a --source that is no import's: the run's own are written
        return None
