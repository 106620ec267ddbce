"""Each rank of ``megatron-k2 evaluate`` and ``generate``: ``python -m megatron_k2.inference.ranks``.

The process group, the model, the work, the output of rank 0.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_k2.data.storage import write_atomically
from megatron_k2.errors import UserError
from megatron_k2.inference.options import (
    Layout,
    check_evaluate,
    check_generate,
    evaluate_parser,
    generate_parser,
    layout_of,
)

if TYPE_CHECKING:
    import torch

    from megatron_k2.inference.model import InferenceModel


@contextlib.contextmanager
def process_group() -> Iterator["torch.device"]:
    """Megatron's host and torchrun's ranks, or one rank alone; yields this rank's device."""
    import torch
    import torch.distributed as dist

    from megatron_k2.parallel.cpu_host import megatron_host

    with megatron_host() as backend, tempfile.TemporaryDirectory() as folder:
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            rendezvous = f"file://{Path(folder) / 'rendezvous'}"
            dist.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1)
        try:
            yield device
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def opened_model(
    directory: Path, saved: Namespace, layout: Layout
) -> Iterator["InferenceModel"]:
    """The checkpoint's model on the ranks there are."""
    import torch

    from megatron_k2.inference.model import load_model, parallel_world
    from megatron_k2.inference.saved_args import model_args

    args = model_args(saved, layout, cuda=torch.cuda.is_available())
    with parallel_world(layout):
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints parameter counts
            model = load_model(directory, args)
        yield model


def world_size() -> int:
    """Ranks, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this rank speaks."""
    return os.environ.get("RANK", "0") == "0"


def run_evaluate(args: argparse.Namespace) -> None:
    """``evaluate``: loss of a split, or a dump of logits."""
    from megatron_k2.data.indexed import read_tokens
    from megatron_k2.inference.saved_args import check_model, read_saved_args

    manifest = check_evaluate(args)
    layout = layout_of(args)
    directory, saved = read_saved_args(args.load, args.iteration)
    seq_length = args.seq_length or saved.seq_length
    check_model(
        saved,
        layout,
        world_size=world_size(),
        seq_length=seq_length,
        data_vocab=manifest.tokenizer.vocab_size,
        data=str(args.data),
    )
    tokens = read_tokens(args.data / manifest.splits[args.split].prefix)
    with process_group() as device, opened_model(directory, saved, layout) as model:
        if args.dump_logits is not None:
            _dump_logits(args, model, tokens, seq_length, device)
        else:
            _evaluate(args, model, tokens, seq_length, device, directory)


def _evaluate(
    args: argparse.Namespace,
    model: "InferenceModel",
    tokens: Any,
    seq_length: int,
    device: "torch.device",
    directory: Path,
) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from megatron_k2.inference.evaluate import evaluate, read_bigram_baseline

    if args.max_tokens is not None:
        tokens = tokens[: args.max_tokens + 1]
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    is_shown = console.is_terminal and is_first_rank()
    with Progress(*columns, console=console, disable=not is_shown) as bar:
        task = bar.add_task("windows")
        result = evaluate(
            model,
            tokens,
            seq_length=seq_length,
            micro_batch_size=args.micro_batch_size,
            device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not is_first_rank():
        return
    bigram = read_bigram_baseline(args.data) if args.split == "valid" else None
    print(
        f"{directory}: {args.split} loss {result.loss_nats:.6f} nats/token, "
        f"perplexity {result.perplexity:.3f}, {result.num_tokens:,} tokens"
    )
    if bigram is not None:
        print(f"bigram baseline {bigram:.6f}, difference {result.loss_nats - bigram:+.6f}")
    if args.json is not None:
        record = {
            **dataclasses.asdict(result),
            "perplexity": result.perplexity,
            "checkpoint": str(directory),
            "data": str(args.data),
            "split": args.split,
            "bigram_nats": bigram,
        }
        write_atomically(args.json, (json.dumps(record, indent=2) + "\n").encode())


def _dump_logits(
    args: argparse.Namespace,
    model: "InferenceModel",
    tokens: Any,
    seq_length: int,
    device: "torch.device",
) -> None:
    from megatron_k2.inference.logits import dump_logits

    if len(tokens) < args.dump_sequences * seq_length:
        raise UserError(
            f"--dump-sequences {args.dump_sequences} of {seq_length} tokens: the split has "
            f"{len(tokens):,}; lower one of them (--seq-length)"
        )
    shape = dump_logits(
        model, tokens, args.dump_sequences, seq_length, args.dump_logits, device, is_first_rank()
    )
    if is_first_rank():
        print(f"{args.dump_logits}: logits {list(shape)}")


def run_generate(args: argparse.Namespace) -> None:
    """``generate``: the prompt and what follows it, on rank 0's stdout."""
    from megatron_k2.data.tokenizer import load_tokenizer
    from megatron_k2.inference.generate import check_length, generate, text_pieces
    from megatron_k2.inference.model import round_up
    from megatron_k2.inference.saved_args import check_model, read_saved_args

    tokenizer = load_tokenizer(check_generate(args))
    layout = layout_of(args)
    directory, saved = read_saved_args(args.load, args.iteration)
    prompt = tokenizer.encode(args.prompt)
    check_length(len(prompt), args.max_new_tokens, saved.max_position_embeddings)
    check_model(
        saved,
        layout,
        world_size=world_size(),
        seq_length=round_up(len(prompt), layout),
        data_vocab=tokenizer.vocab_size,
        data="the tokenizer",
    )
    with process_group() as device, opened_model(directory, saved, layout) as model:
        tokens = generate(
            model,
            prompt,
            layout=layout,
            max_new_tokens=args.max_new_tokens,
            device=device,
            eod_id=tokenizer.eod_id,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )
        output = sys.stdout if is_first_rank() else open(os.devnull, "w")
        print(args.prompt, end="", flush=True, file=output)
        for piece in text_pieces(tokenizer, prompt, tokens):
            print(piece, end="", flush=sys.stdout.isatty(), file=output)
        print(file=output)


def _quieten() -> None:
    """Leave the terminal to the result: no word on absent CUDA, Transformer Engine or apex."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(argv: list[str]) -> int:
    """``evaluate …`` or ``generate …``; 2 for a wrong input."""
    _quieten()
    try:
        if argv[0] == "evaluate":
            run_evaluate(evaluate_parser().parse_args(argv[1:]))
        else:
            run_generate(generate_parser().parse_args(argv[1:]))
    except UserError as error:
        if is_first_rank():
            print(f"megatron-k2 {argv[0]}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
