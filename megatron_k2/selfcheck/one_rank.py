"""One rank in this process with a small model built from flags, on the GPU or on the CPU host."""

import contextlib
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_k2.flags.megatron import add_k2_arguments, model_flags, platform_flags
from megatron_k2.host.cpu import megatron_host
from megatron_k2.presets import ModelPreset


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A world of one rank, and what Megatron keeps globally about it."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with megatron_host() as backend, tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{Path(folder) / 'rendezvous'}", rank=0, world_size=1
        )
        try:
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def arguments(preset: ModelPreset, *extra: str, yarn: bool = False) -> Namespace:
    """Megatron's parsed and validated arguments for ``preset``, as a training run gets them."""
    from megatron.training.arguments import parse_args, validate_args

    flags = [
        *platform_flags(cuda=torch.cuda.is_available()),
        *model_flags(preset, yarn=yarn),
        *"--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3".split(),
        *"--seq-length 64 --max-position-embeddings 64 --tokenizer-type NullTokenizer".split(),
        *f"--vocab-size {preset.vocab_size} --calculate-per-token-loss".split(),
        *extra,
    ]
    before, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        args = parse_args(add_k2_arguments)
        validate_args(args)
    finally:
        sys.argv = before
    args.padded_vocab_size = preset.vocab_size
    return args


def build(
    preset: ModelPreset, *extra: str, yarn: bool = False, padded_vocab_size: int | None = None
) -> Any:
    """The whole model on this rank, from flags; its vocabulary padded where asked for."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_k2.model.build import K2ModelBuilder, model_config_from_args

    args = arguments(preset, *extra, yarn=yarn)
    args.padded_vocab_size = padded_vocab_size or args.padded_vocab_size
    config = model_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = K2ModelBuilder(config).build_model(groups)
    return model.cuda() if torch.cuda.is_available() else model  # buffers too, as Megatron does


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights away from their initial values, where a mistake could hide (norms of 1, biases 0).

    Drawn on the CPU, in fp32: the same numbers on every device, rounded to the weight's dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("expert_bias"):
            tensor.copy_(0.02 * noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
