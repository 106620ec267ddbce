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
    require_normalised_choice(p.moe_router_topk)
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
        "num_nextn_predict_layers": p.num_mtp_layers,
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


def require_normalised_choice(topk: int) -> None:
    """Refuse one expert per token.

    Hugging Face's ``norm_topk_prob`` makes the one weight 1; Megatron 0.19.2 normalises above one
    expert only (``moe_utils.py:868``), so the same weights would compute something else.
    """
    if topk < 2:
        raise UserError(
            f"num_experts_per_tok={topk}: Megatron does not normalise the weight of a single "
            "expert, Hugging Face does; models with 2 or more can be converted"
        )


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


def generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """``generation_config.json``: what ``config.json`` says; sampling is the caller's choice."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {key: config[key] for key in ids if config.get(key) is not None}
    return known | {"max_length": config["max_position_embeddings"]}


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
    "init_method_std",
    "moe_aux_loss_coeff",
    "rotary_base",
)
"""Fields that Megatron's arguments spell as the preset does."""

_YARN_FLAGS = {
    "rotary_scaling_factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "yarn_mla_original_max_position_embeddings",
    "beta_fast": "yarn_mla_beta_fast",
    "beta_slow": "yarn_mla_beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""Field of ``YarnScaling`` -> argument (``flags/megatron.py``)."""

HF_LATENT_NORM_EPSILON = 1e-6
"""Fixed in the released modeling code and in transformers; ``config.json`` has no key for it."""


def preset_from_args(args: Namespace, base: ModelPreset) -> ModelPreset:
    """``base`` with whatever the run's flags overrode, from the arguments its checkpoint saved.

    Args:
        args: Megatron's, as saved. A field that is absent or None keeps the preset's value,
            except ``q_lora_rank``, where None means: no query down-projection.
        base: the preset the run named.

    Returns:
        The preset of the checkpoint. ``yarn`` is None if the run had it off; the longest context
        is then what the run was trained at, else the original one times YaRN's factor.

    Raises:
        UserError: if the run's model cannot be said in a Hugging Face config: a dense layer behind
            one with experts, a shared width that is not a multiple of the expert width, another
            epsilon of the latent norms.
    """
    given = vars(args)
    changes: dict[str, Any] = {k: given[k] for k in _SAME_NAME if given.get(k) is not None}
    if "q_lora_rank" in given:
        changes["q_lora_rank"] = given["q_lora_rank"]
    if given.get("num_experts"):
        changes["num_moe_experts"] = given["num_experts"]
    if "mtp_num_layers" in given:
        changes["num_mtp_layers"] = given["mtp_num_layers"] or 0
    if given.get("layernorm_epsilon") is not None:
        changes["norm_epsilon"] = given["layernorm_epsilon"]
    for name in ("rotary_base", "moe_router_topk_scaling_factor", "moe_aux_loss_coeff"):
        if name in changes:
            changes[name] = float(changes[name])
    changes |= _latent_norm_epsilon(given) | _vocabulary(given) | _dense_layers(given)
    changes |= _shared_experts(given, changes.get("moe_ffn_hidden_size", base.moe_ffn_hidden_size))
    return dataclasses.replace(base, **changes, **_positions(given, base))


def _latent_norm_epsilon(given: dict[str, Any]) -> dict[str, Any]:
    epsilon = given.get("latent_norm_epsilon")
    if epsilon not in (None, HF_LATENT_NORM_EPSILON):
        raise UserError(
            f"saved args: latent_norm_epsilon={epsilon}, but Hugging Face's DeepseekV3 code has "
            f"{HF_LATENT_NORM_EPSILON} built in; such a model cannot be exported"
        )
    return {}


def _vocabulary(given: dict[str, Any]) -> dict[str, Any]:
    """Ids without padding: ``flags/megatron.py`` gives Megatron the exact vocabulary."""
    size = given.get("vocab_size")
    if size is None:
        return {}
    padded = given.get("padded_vocab_size")
    if padded and size > padded:
        raise UserError(f"saved args: a vocabulary of {size} exceeds padded_vocab_size={padded}")
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


def _shared_experts(given: dict[str, Any], expert_width: int) -> dict[str, Any]:
    width = given.get("moe_shared_expert_intermediate_size")
    if width is None:
        return {}
    if width % expert_width:
        raise UserError(
            f"saved args: moe_shared_expert_intermediate_size={width} is not a multiple of "
            f"moe_ffn_hidden_size={expert_width}"
        )
    return {"num_shared_experts": width // expert_width}


def _refuse_scaled_softmax(given: dict[str, Any]) -> None:
    """Megatron 0.19.2 scales MLA's softmax by YaRN's mscale even with ``--rope-type rope``.

    ``multi_latent_attention.py:177``: (0.1 * mscale_all_dim * ln(rotary_scaling_factor) + 1)^2,
    whatever the rope type. Hugging Face does so only under ``rope_scaling``.
    """
    factor, mscale = given.get("rotary_scaling_factor"), given.get("mscale_all_dim")
    if factor and mscale and factor > 1:
        raise UserError(
            f"saved args: rope_type=rope with rotary_scaling_factor={factor} and "
            f"mscale_all_dim={mscale}; Megatron scaled the softmax by them all the same, which a "
            "Hugging Face config without rope_scaling cannot say"
        )


def _positions(given: dict[str, Any], base: ModelPreset) -> dict[str, Any]:
    rope_type = given.get("rope_type")
    if rope_type is None:
        return {}
    if rope_type != "yarn":
        _refuse_scaled_softmax(given)
        trained_at = given.get("max_position_embeddings")
        context = trained_at or without_yarn(base).max_position_embeddings
        return {"yarn": None, "max_position_embeddings": context}
    known = {} if base.yarn is None else dataclasses.asdict(base.yarn)
    for ours, flag in _YARN_FLAGS.items():
        if given.get(flag) is not None:
            known[ours] = float(given[flag])
    if missing := [flag for ours, flag in _YARN_FLAGS.items() if ours not in known]:
        raise UserError(f"saved args say rope_type=yarn but not: {', '.join(missing)}")
    original = int(known.pop("original_max_position_embeddings"))
    yarn = YarnScaling(original_max_position_embeddings=original, **known)
    return {"yarn": yarn, "max_position_embeddings": int(original * yarn.rotary_scaling_factor)}
