"""``config.json`` -> preset: the inverse of ``config``, and what a template lends an export.

Reads the classic keys of the releases (``rope_theta``, ``rope_scaling``) and the
``rope_parameters`` that transformers 5 writes instead. Whatever Megatron cannot be told, or this
package does not map, is refused by name rather than passed over.
"""

import dataclasses
from typing import Any

from megatron_k2.checkpoint.block_fp8.layout import QUANTIZATION_CONFIG
from megatron_k2.checkpoint.hf.config import hf_config, require_normalised_choice
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

_OPTIONAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "initializer_range": "init_method_std",
    "aux_loss_alpha": "moe_aux_loss_coeff",
    "num_nextn_predict_layers": "num_mtp_layers",
}

_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "moe_layer_freq": (1,),
    "norm_topk_prob": (True,),
    "scoring_func": ("sigmoid",),
    "tie_word_embeddings": (False,),
    "topk_method": ("noaux_tc",),
    "model_type": ("kimi_k2", "deepseek_v3"),
}
"""Values the rules and the model code stand for; an absent key means the first."""

MODEL_KEYS = frozenset(_FIELDS) - {"max_position_embeddings"}
"""What a template's ``config.json`` must agree on with the checkpoint it is used for."""

_STATED_BY_RUN = (
    *_FIELDS,
    "num_nextn_predict_layers",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
)
"""Keys an export writes from the checkpoint even if its template says otherwise."""


def preset_from_hf(config: dict[str, Any], base_name: str | None = None) -> ModelPreset:
    """The shape a ``config.json`` describes.

    Args:
        config: its content.
        base_name: preset whose name and training defaults the result has. Default: the one of
            the same shape, else ``kimi-k2``.

    Raises:
        UserError: naming the key that is missing or says what is not supported.
    """
    if missing := [key for key in _FIELDS if key not in config]:
        raise UserError(f"config.json lacks {', '.join(missing)}: not a DeepSeek-V3 class model")
    _require_numbers(config)
    for key, known in _REQUIRED_VALUES.items():
        if config.get(key, known[0]) not in known:
            expected = " or ".join(repr(value) for value in known)
            raise UserError(f"config.json: {key}={config[key]!r}, supported is {expected}")
    require_normalised_choice(config["num_experts_per_tok"])
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(
            f"config.json: hidden_size={config['hidden_size']} does not divide by "
            f"num_attention_heads={config['num_attention_heads']}, which Megatron demands"
        )
    _check_quantization(config.get("quantization_config"))
    fields: dict[str, Any] = {field: config[key] for key, field in _FIELDS.items()}
    fields |= {f: config[k] for k, f in _OPTIONAL.items() if isinstance(config.get(k), int | float)}
    fields["rotary_base"], fields["yarn"] = _positions(config)
    base = get_preset(base_name) if base_name else _same_shape(fields)
    return dataclasses.replace(base, **fields)


def _require_numbers(config: dict[str, Any]) -> None:
    for key in _FIELDS:
        value = config[key]
        kinds = (int, float) if key in _FRACTIONS else (int,)
        is_absent = value is None and key == "q_lora_rank"
        is_none_dense = value == 0 and key == "first_k_dense_replace"
        if not (is_absent or (type(value) in kinds and (value > 0 or is_none_dense))):
            raise UserError(f"config.json: {key}={value!r}, expected a positive number")


def _same_shape(fields: dict[str, Any]) -> ModelPreset:
    shape = [_FIELDS[key] for key in sorted(MODEL_KEYS)]
    for preset in PRESETS.values():
        if all(getattr(preset, name) == fields[name] for name in shape):
            return preset
    return PRESETS["kimi-k2"]


def _check_quantization(quantization: dict[str, Any] | None) -> None:
    if quantization is None:
        return
    known = {key: QUANTIZATION_CONFIG[key] for key in ("quant_method", "weight_block_size", "fmt")}
    found = {"fmt": known["fmt"]} | quantization
    if any(found.get(key) != value for key, value in known.items()):
        said = ", ".join(f"{key}={found.get(key)!r}" for key in known)
        raise UserError(f"config.json: quantization_config has {said}; supported is {known}")


def _positions(config: dict[str, Any]) -> tuple[float, YarnScaling | None]:
    """Rotary base and YaRN, from classic or transformers 5 keys."""
    modern = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", modern.get("rope_theta"))
    if theta is None:
        raise UserError(
            "config.json has neither rope_theta nor rope_parameters; a config re-saved by "
            "transformers 5 may have lost it: take the release's own"
        )
    if theta != int(theta):
        raise UserError(f"config.json: rope_theta={theta}; Megatron's flag takes whole numbers")
    scaling = config.get("rope_scaling") or modern
    if not isinstance(scaling, dict):
        raise UserError(f"config.json: rope_scaling={scaling!r}, expected an object")
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise UserError(f"config.json: rope_scaling of type '{kind}'; supported is 'yarn' or none")
    if missing := {"factor", "original_max_position_embeddings"} - scaling.keys():
        raise UserError(f"config.json: rope_scaling lacks {', '.join(sorted(missing))}")
    return float(theta), YarnScaling(  # defaults are those of DeepSeek's modeling code
        rotary_scaling_factor=float(scaling["factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast", 32.0)),
        beta_slow=float(scaling.get("beta_slow", 1.0)),
        mscale=float(scaling.get("mscale", 1.0)),
        mscale_all_dim=float(scaling.get("mscale_all_dim", 0.0)),
    )


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
        if key in stated and not _agrees(key, template.get(key), stated[key]):
            config[key] = stated[key]
    if "rope_scaling" not in stated:
        config.pop("rope_scaling", None)
    config.pop("rope_parameters", None)  # said again in the classic keys above
    config.pop("quantization_config", None)
    config["model_type"] = kept_type
    if model_type == "deepseek_v3":
        config.pop("auto_map", None)
    return config


def _agrees(key: str, old: Any, new: Any) -> bool:
    """Equal, or the same YaRN spelt with more keys."""
    if key == "rope_scaling" and isinstance(old, dict):
        return all(old.get(name) == value for name, value in new.items())
    if key == "num_nextn_predict_layers":
        return bool((old or 0) == new)
    return bool(old == new)
