"""The arguments an imported checkpoint saves: what a run of this model would say about it.

Export, evaluate and generate read a checkpoint's model from them, and Megatron's loader compares
them with its own. They are the flags a preset stands for, by the names Megatron's parser gives
them, and the few values its validation derives; nothing of machine, layout or training, which an
import does not decide. Whoever builds the model fills those in (``inference.saved_args``).

Neither Megatron nor torch is imported: they take seconds to load, more than a gigabyte to convert.
That each value is what Megatron's own parser and validation make of the flags is a test.
"""

import ast
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.checkpoint.torch_dist.pickles import stand_in
from megatron_k2.flags.megatron import model_flags
from megatron_k2.presets import ModelPreset

_OTHER_NAMES = {"norm_epsilon": "layernorm_epsilon", "disable_bias_linear": "add_bias_linear"}
"""Arguments that are not named as their flag."""

_SWITCHES_OFF = ("disable_bias_linear",)

_LAYER_PATTERN = "moe_layer_freq"  # its flag is a Python expression


def imported_args(preset: ModelPreset, config: dict[str, Any], *, is_bf16: bool) -> Namespace:
    """Megatron's arguments, those that say something about the model.

    Args:
        preset: of the checkpoint; its ``yarn`` decides ``--rope-type``.
        config: the source's ``config.json``, for expert groups, which the preset has no field for.
        is_bf16: whether the weights are bf16 rather than fp32.
    """
    p, context = preset, preset.max_position_embeddings
    flags = [*model_flags(p, yarn=p.yarn is not None), *_group_flags(config)]
    args = {"q_lora_rank": None, "mtp_num_layers": None} | _by_name(flags)
    args[_LAYER_PATTERN] = [0] * p.num_dense_layers + [1] * p.num_moe_layers
    return Namespace(
        **args,
        preset=p.name,
        vocab_size=p.vocab_size,
        padded_vocab_size=p.vocab_size,
        tokenizer_type="NullTokenizer",
        seq_length=context,
        max_position_embeddings=context,
        bf16=is_bf16,
        fp16=False,
        params_dtype=stand_in("torch", (Dtype.BF16 if is_bf16 else Dtype.FP32).torch_name),
        kv_channels=p.hidden_size // p.num_attention_heads,
        add_position_embedding=True,
        # weights of one rank, as far as "saved at" goes
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        world_size=1,
    )


def _by_name(flags: Sequence[str]) -> dict[str, Any]:
    """``--some-name 3`` -> ``{"some_name": 3}``; a switch is True."""
    args: dict[str, Any] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            flag = word.removeprefix("--").replace("-", "_")
            name = _OTHER_NAMES.get(flag, flag)
            args[name] = flag not in _SWITCHES_OFF
        else:
            args[name] = _value(word)
    return args


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _group_flags(config: dict[str, Any]) -> list[str]:
    """Flags of DeepSeek-V3's choice among groups of experts; none for K2, which has one group."""
    groups = config.get("n_group") or 1
    if groups == 1:
        return []
    chosen = config["topk_group"]
    return f"--moe-router-num-groups {groups} --moe-router-group-topk {chosen}".split()
