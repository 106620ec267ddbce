"""A recipe as Megatron-Bridge's ``ConfigContainer``; Bridge is imported here and nowhere else.

The recipe's flags go through Megatron's own parser, and each part of the config that Megatron makes
of them becomes Bridge's class of the same name, which extends it. The model is this package's, by
its builder, so architecture and YaRN are whole. Bridge has no place for, and so is not carried:

- MuonClip: Bridge makes its optimizer by itself. What is left is Megatron's optimizer of the flags,
  AdamW where states are sharded (every recipe of a cluster) and its Muon in the twins; no head is
  clipped.
- metrics, checks before a run, what is done about a spike, the optimizer's state of the phase
  before, Moonlight's bias rule with the mean taken out: hooks of our loop.
- checkpoints: Bridge writes its own kind, which this package's runs do not resume from.
"""

import os
import sys
import warnings
from argparse import Namespace
from dataclasses import fields
from typing import Any
from unittest.mock import patch

from megatron_k2.errors import UserError
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.stage import FineTuning, ReinforcementLearning

PARTS = {
    "train": "TrainingConfig",
    "optimizer": "OptimizerConfig",
    "ddp": "DistributedDataParallelConfig",
    "scheduler": "SchedulerConfig",
    "logger": "LoggerConfig",
    "tokenizer": "TokenizerConfig",
    "checkpoint": "CheckpointConfig",
    "dist": "DistributedInitConfig",
    "profiling": "ProfilingConfig",
    "rerun_state_machine": "RerunStateMachineConfig",
}
"""Part of the container -> Bridge's class, which extends Megatron's of that name."""
SAME = ("rng", "validation")
"""Parts of which Bridge takes Megatron's own class."""
DATA_FIELDS = (
    *("split", "num_dataset_builder_threads", "mmap_bin_files", "mid_level_dataset_surplus"),
    *("reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
)
"""Data settings whose name in Bridge is the flag's."""


def to_bridge_config(recipe: Recipe, save: str, start_from: str | None = None) -> Any:
    """The ``ConfigContainer`` of ``recipe``, not yet validated; warns that it is without MuonClip.

    Args:
        recipe: one whose modules can be used here: those of a cluster need Transformer Engine.
        save: the run's directory.
        start_from: as in ``Recipe.program_flags``, in a format that Bridge reads.

    Raises:
        UserError: for fine-tuning, since Bridge packs its own way, and reinforcement learning;
            where Megatron-Bridge cannot be imported.
    """
    if isinstance(recipe.stage, ReinforcementLearning):
        raise UserError(
            f"{recipe.name}: Megatron-Bridge has no loop that samples; launch it without Bridge"
        )
    if isinstance(recipe.stage, FineTuning):
        raise UserError(
            f"{recipe.name}: Megatron-Bridge packs documents its own way, and reads no set of "
            "'megatron-k2 data chat'; launch it without Bridge"
        )
    bridge = _bridge()
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_k2.model.build import model_config_from_args

    args = _parsed(recipe, save, start_from)
    model = model_config_from_args(args)
    megatrons = pretrain_cfg_container_from_args(args, model)
    warnings.warn(
        f"{recipe.name} through Megatron-Bridge: MuonClip has no place there, Megatron's "
        f"{megatrons.optimizer.optimizer} trains and no head is clipped",
        stacklevel=2,
    )
    parts = {
        part: _as(getattr(bridge, name), getattr(megatrons, part)) for part, name in PARTS.items()
    }
    if args.use_pytorch_profiler:  # there one of the two; Megatron's --profile goes with both
        parts["profiling"].use_nsys_profiler = False
    return bridge.ConfigContainer(
        model=model,
        dataset=_dataset(bridge, args),
        **parts,
        **{part: getattr(megatrons, part) for part in SAME},
    )


def _bridge() -> Any:
    try:
        import megatron.bridge.training.config as module
    except ModuleNotFoundError as error:
        raise UserError(
            f"Megatron-Bridge cannot be imported ({error}): docs/compatibility.md says how it is "
            "installed, patches/ what it needs without Transformer Engine"
        ) from None
    return module


def _parsed(recipe: Recipe, save: str, start_from: str | None) -> Namespace:
    """The recipe's flags as rank 0 of its world reads them."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_k2.flags.megatron import add_k2_arguments

    flags = recipe.to_megatron_args(save, start_from)
    world = {"WORLD_SIZE": str(recipe.layout.world_size), "RANK": "0", "LOCAL_RANK": "0"}
    with patch.dict(os.environ, world), patch.object(sys, "argv", ["train", *flags]):
        args = parse_args(add_k2_arguments)
        validate_args(args)
    return args


def _as(target: type, source: Any) -> Any:
    """``source`` as its extension ``target``, every field kept."""
    return target(**{f.name: getattr(source, f.name) for f in fields(source) if f.init})


def _dataset(bridge: Any, args: Namespace) -> Any:
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    named = {name: getattr(args, name) for name in DATA_FIELDS}
    named |= {"random_seed": args.seed, "path_to_cache": args.data_cache_path}
    if args.mock_data:
        return bridge.MockGPTDatasetConfig(seq_length=args.seq_length, **named)
    return bridge.GPTDatasetConfig(
        seq_length=args.seq_length, blend=blend, blend_per_split=blend_per_split, **named
    )
