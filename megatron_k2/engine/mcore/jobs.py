"""What is to be done and with which checkpoint, checked: no process group, no weights.

Run by every rank, and by the command before it starts several: a rank's error comes wrapped in
torchrun's report, this one in a line.
"""

import argparse
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_k2.data.indexed import read_tokens
from megatron_k2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_k2.engine.mcore.options import check_evaluate, check_generate, layout_of
from megatron_k2.engine.mcore.saved_args import check_model, plain_saved_args
from megatron_k2.engine.protocol import SamplingParams
from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import Layout


@dataclass(frozen=True)
class EvaluateJob:
    """The checked inputs of ``evaluate``: a checkpoint, its layout here, and the tokens."""

    directory: Path
    """The checkpoint itself: ``iter_*`` or ``release``."""
    saved: Namespace
    layout: Layout
    tokens: np.ndarray
    """[num_tokens], the first two or more of the split, as a memory map."""
    seq_length: int


@dataclass(frozen=True)
class GenerateJob:
    """The checked inputs of ``generate``: a checkpoint, its layout here, and the prompt."""

    directory: Path
    saved: Namespace
    layout: Layout
    tokenizer: Tokenizer
    prompt: list[int]
    params: SamplingParams


def evaluate_job(args: argparse.Namespace, world_size: int) -> EvaluateJob:
    """Settle ``evaluate``'s options against checkpoint, data and ranks.

    Raises:
        UserError: for every wrong input.
    """
    manifest = check_evaluate(args)
    layout = layout_of(args, world_size)
    directory, saved = plain_saved_args(args.load, args.iteration)
    seq_length = args.seq_length or saved.seq_length
    check_model(
        saved,
        layout,
        seq_length=seq_length,
        data_vocab=manifest.tokenizer.vocab_size,
        data=str(args.data),
    )
    tokens = read_tokens(args.data / manifest.splits[args.split].prefix)
    if args.max_tokens is not None:
        tokens = tokens[: args.max_tokens + 1]
    if args.dump_logits is not None and len(tokens) < args.dump_sequences * seq_length:
        raise UserError(
            f"--dump-sequences {args.dump_sequences} of {seq_length} tokens: there are "
            f"{len(tokens):,}; lower one of them (--seq-length)"
        )
    return EvaluateJob(directory, saved, layout, tokens, seq_length)


def generate_job(args: argparse.Namespace, world_size: int) -> GenerateJob:
    """Settle ``generate``'s options against checkpoint, tokenizer and ranks.

    Raises:
        UserError: for every wrong input.
    """
    tokenizer = load_tokenizer(check_generate(args))
    layout = layout_of(args, world_size)
    prompt = tokenizer.encode(args.prompt)
    directory, saved = plain_saved_args(args.load, args.iteration)
    check_length(len(prompt), args.max_new_tokens, saved.max_position_embeddings)
    check_model(
        saved,
        layout,
        seq_length=round_up(len(prompt), layout),
        data_vocab=tokenizer.vocab_size,
        data="the tokenizer",
    )
    params = sampling_params(args, tokenizer.eod_id)
    return GenerateJob(directory, saved, layout, tokenizer, prompt, params)


def sampling_params(
    args: argparse.Namespace, end_id: int | None, num_before: int = 0
) -> SamplingParams:
    """What the command line says about the next token.

    Args:
        args: of ``generate`` or ``chat``.
        end_id: ends an answer.
        num_before: answers of the same dialogue; each draws by a seed of its own.

    Raises:
        UserError: a value outside its range.
    """
    return SamplingParams(
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed + num_before,
        stop_token_ids=() if end_id is None else (end_id,),
    )


def check_length(num_prompt: int, max_new_tokens: int, max_length: int) -> None:
    """Refuse what would leave the positions that the model knows."""
    if num_prompt == 0:
        raise UserError("--prompt is empty; at least one token is needed")
    if num_prompt + max_new_tokens > max_length:
        raise UserError(
            f"a prompt of {num_prompt} tokens and --max-new-tokens {max_new_tokens} exceed the "
            f"model's {max_length} positions; at most {max(0, max_length - num_prompt)} new "
            "tokens fit"
        )


def round_up(num_tokens: int, layout: Layout) -> int:
    """The next length that sequence and context parallelism can cut."""
    cp = layout.cp
    multiple = (2 * cp if cp > 1 else 1) * layout.tp
    return -(-num_tokens // multiple) * multiple
