"""The arguments an imported checkpoint saves: those a run of this model would have saved.

Export, evaluate and generate read a checkpoint's model from them, and Megatron's loader compares
them with its own. They come from the same flags and Megatron's own validation, so that an imported
checkpoint is not told from a trained one.
"""

import contextlib
import io
import sys
from argparse import Namespace
from typing import Any

import torch

from megatron_k2.parallel.cpu_host import megatron_host
from megatron_k2.presets import ModelPreset
from megatron_k2.training.flags import add_k2_arguments, model_flags, platform_flags


def imported_args(preset: ModelPreset, config: dict[str, Any], *, is_bf16: bool) -> Namespace:
    """Validated Megatron arguments.

    Args:
        preset: of the checkpoint; its ``yarn`` decides ``--rope-type``.
        config: the source's ``config.json``, for expert groups, which the preset has no field for.
        is_bf16: whether the weights are bf16 rather than fp32.
    """
    from megatron.training.arguments import parse_args, validate_args

    context = preset.max_position_embeddings
    flags = [
        *platform_flags(cuda=torch.cuda.is_available()),
        *model_flags(preset, yarn=preset.yarn is not None),
        *f"--preset {preset.name} --vocab-size {preset.vocab_size}".split(),
        *f"--seq-length {context} --max-position-embeddings {context}".split(),
        *"--micro-batch-size 1 --train-iters 1 --lr 1e-4 --tokenizer-type NullTokenizer".split(),
        *_group_flags(config),
        *(["--bf16"] if is_bf16 else []),
    ]
    before = sys.argv
    sys.argv = [before[0], *flags]
    try:
        # validate_args prints every argument; what it refuses comes as an exception
        with megatron_host(), contextlib.redirect_stdout(io.StringIO()):
            args = parse_args(add_k2_arguments)
            validate_args(args)
    finally:
        sys.argv = before
    args.padded_vocab_size = preset.vocab_size
    return args


def _group_flags(config: dict[str, Any]) -> list[str]:
    """DeepSeek-V3 chooses among groups of experts first; K2 has one group, which is no choice."""
    groups = config.get("n_group") or 1
    if groups == 1:
        return []
    chosen = config["topk_group"]
    return f"--moe-router-num-groups {groups} --moe-router-group-topk {chosen}".split()
