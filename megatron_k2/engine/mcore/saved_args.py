"""The model of a checkpoint, from the arguments its run saved, at another layout and machine.

Saved arguments are Megatron's own, already validated. What they say about the model is kept; what
they say about layout and machine is taken from a fresh parse of Megatron's flags.
"""

import argparse
import copy
import json
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.torch_dist.pickles import Resolve
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import add_k2_arguments, platform_flags
from megatron_k2.parallel.layout import Layout, Workload, check_layout
from megatron_k2.run.iterations import find_iteration

MANIFESTS = ("chat.json", "dataset.json")
"""Of a prepared dataset; each names the tokenizer beside it."""
_LAYOUT = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
)
"""Beside the fields of Megatron's ``ModelParallelConfig``."""

_MACHINE = (
    "distributed_backend",
    "transformer_impl",
    "masked_softmax_fusion",
    "bias_swiglu_fusion",
    "bias_gelu_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "no_persist_layer_norm",
    "moe_permute_fusion",
    "moe_router_fusion",
    "moe_enable_deepep",
    "cuda_graph_impl",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
)
"""Kernels and what only a backward pass needs."""

_PRECISION = ("fp16", "bf16")
"""Fields of ``ModelParallelConfig`` that the model decides and the layout does not."""


def read_saved_args(load: Path, iteration: int | None) -> tuple[Path, Namespace]:
    """The checkpoint's ``iter_*`` directory and its run's arguments, to build Megatron's model of.

    Raises:
        UserError: no checkpoint there, a damaged one, or one that saved no arguments.
    """
    return _read(load, iteration, true_class)


def plain_saved_args(load: Path, iteration: int | None) -> tuple[Path, Namespace]:
    """The same with stand-ins for Megatron's classes: it is not imported, which takes seconds."""
    return _read(load, iteration, lambda module, name: None)


def _read(load: Path, iteration: int | None, resolve: Resolve) -> tuple[Path, Namespace]:
    source = MegatronSource(find_iteration(load, iteration))
    args = source.read_common(resolve).get("args")
    if args is None:
        raise UserError(
            f"{source.directory} saved no arguments, so its model is not known; only checkpoints "
            "of megatron_k2.training.pretrain or Megatron's own pretraining can be run"
        )
    if getattr(args, "num_layers", None) is None or not args.vocab_size:
        raise UserError(f"{source.directory}: saved args without num_layers or vocab_size")
    return source.directory, args


def true_class(module: str, name: str) -> Any:
    """What saved arguments may hold: torch's dtypes, and classes on Megatron's own list."""
    import torch
    from megatron.core.safe_globals import SAFE_GLOBALS

    if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
        return dtype
    known = {(found.__module__, found.__name__): found for found in SAFE_GLOBALS}
    return known.get((module, name))


def check_model(
    saved: Namespace,
    layout: Layout,
    *,
    seq_length: int,
    data_vocab: int,
    data: str,
) -> None:
    """Refuse a layout that does not divide, and tokens that are not the model's.

    Args:
        saved: of the checkpoint.
        layout: asked for.
        seq_length: of one window, in tokens.
        data_vocab: ids of the data or of the tokenizer.
        data: what to call it in a message.

    Raises:
        UserError: naming the value and what would do.
    """
    if data_vocab != saved.vocab_size:
        raise UserError(
            f"the vocabulary of {data} has {data_vocab} ids, the model's {saved.vocab_size}; "
            "take the tokenizer the model was trained with"
        )
    load = Workload(
        num_layers=saved.num_layers,
        num_attention_heads=saved.num_attention_heads,
        num_moe_experts=saved.num_experts,
        seq_length=seq_length,
        global_batch_size=layout.world_size,
    )
    check_layout(layout, load)


def _layout_flags(layout: Layout) -> list[str]:
    by_hand = layout.pipeline_layout
    split = ["--pipeline-model-parallel-layout", by_hand] if by_hand else []
    return [*layout.degree_flags(), *split]


def model_args(saved: Namespace, layout: Layout, *, cuda: bool) -> Namespace:
    """Arguments from which ``model_config_from_args`` builds the saved model at ``layout``.

    The vocabulary is padded anew for TP: Megatron's loader cuts or fills the difference.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser = add_k2_arguments(add_megatron_arguments(parser))
    fresh = vars(parser.parse_args([*platform_flags(cuda=cuda), *_layout_flags(layout)]))
    parallel = {field.name for field in fields(ModelParallelConfig)} - {*_PRECISION}
    args = copy.copy(saved)
    for name, value in fresh.items():
        if name in parallel or name in _LAYOUT or name in _MACHINE or not hasattr(saved, name):
            setattr(args, name, value)
    args.virtual_pipeline_model_parallel_size = None
    args.overlap_p2p_comm = False  # the plain schedule's sends and receives come in batches
    args.moe_token_dispatcher_type = "alltoall"
    multiple = args.make_vocab_size_divisible_by * layout.tp
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    return args


def tokenizer_path(
    saved: Namespace, tokenizer: str | Path | None = None, data: str | Path | None = None
) -> Path:
    """Where a run's tokenizer lies.

    Args:
        saved: the checkpoint's arguments; what it was trained on says where.
        tokenizer: taken instead, where given.
        data: a dataset whose tokenizer is taken instead.

    Raises:
        UserError: nothing names one.
    """
    if tokenizer is not None:
        return Path(tokenizer)
    trained_on = [*(getattr(saved, "sft_data", None) or []), getattr(saved, "data", None)]
    candidates = [data] if data is not None else [each for each in trained_on if each]
    for directory in map(Path, candidates):
        for manifest in MANIFESTS:
            if (path := directory / manifest).is_file():
                return directory / json.loads(path.read_text())["tokenizer"]["path"]
    looked = ", ".join(map(str, candidates)) or "the checkpoint names no data"
    raise UserError(f"no tokenizer found ({looked}); give --tokenizer or --data")
