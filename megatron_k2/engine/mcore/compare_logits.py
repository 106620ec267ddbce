"""Two checkpoints of either kind by their logits: each run by its own side's code.

A Megatron checkpoint runs in Megatron (one rank, ``engine.mcore``), a Hugging Face
directory in transformers, by its own reading of the untouched ``config.json``. Weights are what
lies on the disk, widened; FP8 is dequantised to bf16 first, as an import does, so a checkpoint and
its FP8 source agree.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from megatron_k2.checkpoint.hf.reader import HfSource, is_hf_directory
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.checkpoint.verify.against_reference import LogitComparison, compare_outputs
from megatron_k2.checkpoint.verify.reference_model import reference_model
from megatron_k2.errors import UserError
from megatron_k2.run.iterations import find_iteration

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compare_logits(
    a: Path,
    b: Path,
    *,
    dtype: str = "fp32",
    num_sequences: int = 2,
    seq_length: int = 32,
    seed: int = 0,
) -> LogitComparison:
    """Logits of A against those of B on random tokens.

    Args:
        a: Hugging Face directory or Megatron ``--save`` directory.
        b: the same; its logits are the reference.
        dtype: to compute in, ``fp32`` or ``bf16``.
        num_sequences: to run.
        seq_length: tokens of each.
        seed: of the tokens.

    Raises:
        UserError: if the vocabularies differ.
    """
    sizes = [vocabulary_of(directory) for directory in (a, b)]
    if sizes[0] != sizes[1]:
        raise UserError(f"--logits: A has {sizes[0]} ids, B has {sizes[1]}; not the same model")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, sizes[0], (num_sequences, seq_length), generator=generator)
    return compare_outputs(logits_of(a, tokens, dtype), logits_of(b, tokens, dtype))


def vocabulary_of(directory: Path) -> int:
    """Ids of a checkpoint's model, without padding.

    Raises:
        UserError: it does not say.
    """
    if is_hf_directory(directory):
        size = HfSource(directory).config.get("vocab_size")
        if type(size) is not int:
            raise UserError(f"{directory / 'config.json'}: vocab_size={size!r}, expected a number")
        return size
    saved = MegatronSource(find_iteration(directory)).args
    if saved is None:
        raise UserError(f"{directory} saved no arguments, so its model cannot be run")
    return int(saved.vocab_size)


def logits_of(directory: Path, tokens: Tensor, dtype: str = "fp32") -> Tensor:
    """Logits [b, s, V] fp32 of tokens [b, s], by the code of the checkpoint's own side."""
    if is_hf_directory(directory):
        return _transformers_logits(HfSource(directory), tokens, DTYPES[dtype])
    return _megatron_logits(directory, tokens, DTYPES[dtype])


def _transformers_logits(source: HfSource, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    model, loading = reference_model(source)
    if absent := sorted(loading.get("missing_keys", ())):
        raise UserError(
            f"{source.directory}: {len(absent)} tensors of the model are not in the checkpoint: "
            + ", ".join(absent[:3])
        )
    if dtype != torch.float32:
        for parameter in model.parameters():  # buffers (router bias, rotary) stay fp32, as trained
            parameter.data = parameter.data.to(dtype)
    with torch.inference_mode():
        return model(tokens).logits.float()


def _megatron_logits(directory: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    from megatron_k2.engine.mcore.ranks import opened_model, process_group
    from megatron_k2.engine.mcore.saved_args import read_saved_args
    from megatron_k2.parallel.layout import Layout

    iteration, saved = read_saved_args(directory, None)
    args = copy.copy(saved)
    args.bf16, args.fp16, args.params_dtype = dtype == torch.bfloat16, False, dtype
    args.mtp_num_layers = None  # prediction layers do not reach the next token's logits
    with process_group() as device, opened_model(iteration, args, Layout()) as model:
        return model.whole_logits(tokens.to(device)).cpu()
