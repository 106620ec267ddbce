"""``config.json``, ``generation_config.json`` and the model card of an exported checkpoint.

The keys are the classic ones of the released Kimi-K2-Instruct file: ``rope_theta`` and
``rope_scaling`` rather than the ``rope_parameters`` that transformers 5 writes, because vLLM,
SGLang and llama.cpp read the classic ones and transformers 5 reads both.

``model_type`` is ``kimi_k2`` as released. transformers has no such type without remote code, so
``deepseek_v3``, the same architecture, is offered for loading by ``AutoModelForCausalLM``; then
``auto_map`` (which names code files of the release) is left out.
"""

import dataclasses
from argparse import Namespace
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset, YarnScaling

MODEL_TYPES = ("kimi_k2", "deepseek_v3")
TORCH_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}

_AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}

_FIXED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "n_group": 1,  # K2 has no expert groups: one group of all, of which one is chosen
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "4.48.3",  # whose keys these are; the release says the same
    "use_cache": True,
}
"""What every K2-class model has in common."""


def hf_config(
    preset: ModelPreset, *, model_type: str = "kimi_k2", dtype: str = "bf16"
) -> dict[str, Any]:
    """``config.json`` of ``preset``, without ``quantization_config``.

    Args:
        preset: ``rope_scaling`` is written if its ``yarn`` is set; ``without_yarn`` unsets it.
        model_type: one of ``MODEL_TYPES``.
        dtype: of the weights, ``bf16`` or ``fp32``.
    """
    if model_type not in MODEL_TYPES:
        raise UserError(f"--model-type '{model_type}' is not one of: {', '.join(MODEL_TYPES)}")
    p = preset
    config = _FIXED | {
        "aux_loss_alpha": p.moe_aux_loss_coeff,
        "bos_token_id": p.bos_token_id,
        "eos_token_id": p.eos_token_id,
        "first_k_dense_replace": p.num_dense_layers,
        "hidden_size": p.hidden_size,
        "initializer_range": p.init_method_std,
        "intermediate_size": p.ffn_hidden_size,
        "kv_lora_rank": p.kv_lora_rank,
        "max_position_embeddings": p.max_position_embeddings,
        "model_type": model_type,
        "moe_intermediate_size": p.moe_ffn_hidden_size,
        "n_routed_experts": p.num_moe_experts,
        "n_shared_experts": p.num_shared_experts,
        "num_attention_heads": p.num_attention_heads,
        "num_experts_per_tok": p.moe_router_topk,
        "num_hidden_layers": p.num_layers,
        "num_key_value_heads": p.num_attention_heads,  # MLA: every head has its own key
        "q_lora_rank": p.q_lora_rank,
        "qk_nope_head_dim": p.qk_head_dim,
        "qk_rope_head_dim": p.qk_pos_emb_head_dim,
        "rms_norm_eps": p.norm_epsilon,
        "rope_theta": p.rotary_base,
        "routed_scaling_factor": p.moe_router_topk_scaling_factor,
        "tie_word_embeddings": p.tie_word_embeddings,
        "torch_dtype": TORCH_DTYPES[dtype],
        "v_head_dim": p.v_head_dim,
        "vocab_size": p.vocab_size,
    }
    if model_type == "kimi_k2":
        config["auto_map"] = dict(_AUTO_MAP)
    if p.yarn is not None:
        config["rope_scaling"] = _rope_scaling(p.yarn)
    return dict(sorted(config.items()))


def _rope_scaling(yarn: YarnScaling) -> dict[str, Any]:
    return {
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "factor": yarn.rotary_scaling_factor,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "type": "yarn",
    }


def generation_config(preset: ModelPreset) -> dict[str, Any]:
    """``generation_config.json``: only what the preset knows; sampling is the caller's choice."""
    return {
        "bos_token_id": preset.bos_token_id,
        "eos_token_id": preset.eos_token_id,
        "max_length": preset.max_position_embeddings,
    }


def without_yarn(preset: ModelPreset) -> ModelPreset:
    """The preset as it is before context extension: plain rotary, the original longest context."""
    if preset.yarn is None:
        return preset
    original = preset.yarn.original_max_position_embeddings
    return dataclasses.replace(preset, yarn=None, max_position_embeddings=original)


_SAME_NAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_topk_scaling_factor",
    "norm_epsilon",
    "init_method_std",
    "max_position_embeddings",
)
"""Fields that Megatron's arguments spell as the preset does."""

_MAY_BE_NONE = ("q_lora_rank",)


def preset_from_args(args: Namespace, base: ModelPreset) -> ModelPreset:
    """``base`` with whatever the run's flags overrode, from the arguments its checkpoint saved.

    Args:
        args: Megatron's, as saved. A field that is absent or None keeps the preset's value,
            except ``q_lora_rank``, where None means: no query down-projection.
        base: the preset the run named.

    Raises:
        UserError: if the layers with experts are not all behind the dense ones, or the shared
            experts' width is not a multiple of the expert width; Hugging Face's layout has no
            place for such a model.
    """
    given = vars(args)
    changes = {
        name: given[name]
        for name in _SAME_NAME
        if name in given and (given[name] is not None or name in _MAY_BE_NONE)
    }
    preset = dataclasses.replace(base, **changes)
    moved = {"num_experts": "num_moe_experts", "rotary_base": "rotary_base"}
    changes = {ours: given[theirs] for theirs, ours in moved.items() if given.get(theirs)}
    changes |= _vocabulary(given, base) | _dense_layers(given) | _shared_experts(given, preset)
    if isinstance(coefficient := given.get("moe_aux_loss_coeff"), float):
        changes["moe_aux_loss_coeff"] = coefficient
    preset = dataclasses.replace(preset, **changes)
    return dataclasses.replace(preset, yarn=_yarn(given, base))


def _vocabulary(given: dict[str, Any], base: ModelPreset) -> dict[str, Any]:
    size = given.get("vocab_size") or base.vocab_size
    padded = given.get("padded_vocab_size")
    if padded and size > padded:
        raise UserError(f"saved args: vocab_size={size} exceeds padded_vocab_size={padded}")
    return {"vocab_size": size}


def _dense_layers(given: dict[str, Any]) -> dict[str, Any]:
    pattern = given.get("moe_layer_freq")
    if not isinstance(pattern, list):
        return {}
    num_dense = pattern.count(0)
    if any(pattern[:num_dense]):
        raise UserError(
            f"saved args: moe_layer_freq={pattern} has a dense layer behind one with experts; "
            "first_k_dense_replace of the Hugging Face config cannot say that"
        )
    return {"num_dense_layers": num_dense}


def _shared_experts(given: dict[str, Any], preset: ModelPreset) -> dict[str, Any]:
    width = given.get("moe_shared_expert_intermediate_size")
    if width is None:
        return {}
    if width % preset.moe_ffn_hidden_size:
        raise UserError(
            f"saved args: moe_shared_expert_intermediate_size={width} is not a multiple of "
            f"moe_ffn_hidden_size={preset.moe_ffn_hidden_size}"
        )
    return {"num_shared_experts": width // preset.moe_ffn_hidden_size}


def _yarn(given: dict[str, Any], base: ModelPreset) -> YarnScaling | None:
    rope_type = given.get("rope_type")
    if rope_type is None:
        return base.yarn
    if rope_type != "yarn":
        return None
    names = [field.name for field in dataclasses.fields(YarnScaling)]
    known = {name: float(given[name]) for name in names if given.get(name) is not None}
    if base.yarn is not None:
        known = {**dataclasses.asdict(base.yarn), **known}
    if missing := [name for name in names if name not in known]:
        raise UserError(f"saved args say rope_type=yarn but not: {', '.join(missing)}")
    length = int(known.pop("original_max_position_embeddings"))
    return YarnScaling(original_max_position_embeddings=length, **known)
