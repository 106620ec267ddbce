"""A run's model as a ``config.json`` says it: what an export writes, and what an engine reads."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.hf.config import hf_config, preset_from_args, without_yarn
from megatron_k2.checkpoint.hf.language_model import language_config
from megatron_k2.checkpoint.hf.preset import config_like
from megatron_k2.checkpoint.hf.reader import read_json
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset, get_preset


def settle_preset(saved: Any, name: str | None, use_yarn: bool | None) -> ModelPreset:
    """The shape of the checkpoint: the preset, changed by the run's flags where it saved them.

    Args:
        saved: Megatron's ``args`` of the run, or None.
        name: the preset's name, or None to take ``args.preset``.
        use_yarn: whether the position encoding is YaRN's; None to take ``args.rope_type``.

    Raises:
        UserError: if name or YaRN are in neither place.
    """
    name = name or getattr(saved, "preset", None)
    if name is None:
        raise UserError("the checkpoint saved no preset name; give one with --preset")
    base = get_preset(name)
    preset = base if saved is None else preset_from_args(saved, base)
    if use_yarn is False:
        return without_yarn(preset)
    if use_yarn is None and getattr(saved, "rope_type", None) is None and base.yarn is not None:
        raise UserError(
            f"preset '{name}' can be trained with and without YaRN and the checkpoint does not "
            "say which; give --yarn or --no-yarn"
        )
    if use_yarn and preset.yarn is None:
        if base.yarn is None:
            raise UserError(f"--yarn: preset '{name}' has no YaRN parameters")
        return dataclasses.replace(
            preset, yarn=base.yarn, max_position_embeddings=base.max_position_embeddings
        )
    return preset


def template_of(source_release: Path | None) -> dict[str, Any] | None:
    """The configuration that the weights came with, where they came from a release."""
    if source_release is None:
        return None
    return language_config(read_json(source_release / "config.json"))


def run_config(
    saved: Any,
    preset: ModelPreset,
    template: dict[str, Any] | None,
    *,
    model_type: str | None = None,
    dtype: str = "bf16",
) -> dict[str, Any]:
    """The content of ``config.json``, without ``quantization_config``.

    Args:
        saved: Megatron's ``args`` of the run, or None.
        preset: of the checkpoint (``settle_preset``).
        template: of ``template_of``.
        model_type: None: the template's, else ``kimi_k2``.
        dtype: of the weights, ``bf16`` or ``fp32``.
    """
    if template is not None:
        return config_like(template, preset, model_type=model_type, dtype=dtype)
    config = hf_config(preset, model_type=model_type or "kimi_k2", dtype=dtype)
    return config | _expert_groups(saved) | _tokens_of_another_vocabulary(preset)


def _tokens_of_another_vocabulary(preset: ModelPreset) -> dict[str, None]:
    """The preset's bos and eos are not those of a run with another vocabulary than its own.

    Said as null: without the keys transformers takes 0 and 1.
    """
    if preset.vocab_size == get_preset(preset.name).vocab_size:
        return {}
    return {"bos_token_id": None, "eos_token_id": None}


def _expert_groups(saved: Any) -> dict[str, int]:
    """DeepSeek-V3's two-stage choice, which the preset has no field for."""
    groups = getattr(saved, "moe_router_num_groups", None)
    chosen = getattr(saved, "moe_router_group_topk", None)
    return {"n_group": groups, "topk_group": chosen} if groups and chosen else {}
