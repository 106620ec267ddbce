"""Each rank of ``evaluate``, ``generate``, ``chat``: ``python -m megatron_k2.engine.mcore.ranks``.

The process group, the model, the work, the output of rank 0. Text of one rank comes from the
embedded engine; loss and logits are Megatron's own at any number of ranks, since they are what a
run, an export and an engine are judged by.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_k2.engine.mcore.options import (
    chat_parser,
    evaluate_parser,
    generate_parser,
)
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.host.torchrun import refuse
from megatron_k2.parallel.layout import Layout
from megatron_k2.quiet import quieten

if TYPE_CHECKING:
    import torch

    from megatron_k2.engine.local.core import Core
    from megatron_k2.engine.mcore.chat import Continue
    from megatron_k2.engine.mcore.evaluate import Evaluation
    from megatron_k2.engine.mcore.jobs import EvaluateJob
    from megatron_k2.engine.mcore.model import InferenceModel


@contextlib.contextmanager
def process_group() -> Iterator["torch.device"]:
    """Megatron's host and torchrun's ranks, or one rank alone; yields this rank's device."""
    import torch
    import torch.distributed as dist

    from megatron_k2.host.cpu import megatron_host

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
def opened_model(directory: Path, saved: Namespace, layout: Layout) -> Iterator["InferenceModel"]:
    """The checkpoint's model on the ranks there are."""
    import torch

    from megatron_k2.engine.mcore.model import load_model, parallel_world
    from megatron_k2.engine.mcore.saved_args import model_args

    args = model_args(saved, layout, cuda=torch.cuda.is_available())
    with parallel_world(layout):
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints parameter counts
            model = load_model(directory, args)
        yield model


@contextlib.contextmanager
def continuing(
    directory: Path, saved: Namespace, layout: Layout, length: int
) -> "Iterator[Continue]":
    """What continues prompts: the embedded engine on one rank, Megatron's model over several.

    A model that is spread over ranks has no cache, and is computed anew for each token.

    Args:
        directory: the checkpoint.
        saved: its run's arguments, without Megatron's classes.
        layout: over the ranks there are.
        length: most tokens of a prompt and its answer.
    """
    import functools

    if layout.world_size == 1:
        from megatron_k2.engine.local.offline import continued

        yield functools.partial(continued, _core(directory, saved, length))
        return
    from megatron_k2.engine.mcore.generate import generate
    from megatron_k2.engine.mcore.saved_args import read_saved_args

    _, saved = read_saved_args(directory, None)
    with process_group() as device, opened_model(directory, saved, layout) as model:
        yield functools.partial(generate, model, layout=layout, device=device)


def _core(directory: Path, saved: Namespace, length: int) -> "Core":
    """The engine with one slot, in the precision of the run."""
    import torch

    from megatron_k2.engine.local.opened import core_of

    return core_of(
        directory,
        num_slots=1,
        max_length=length,
        dtype=torch.bfloat16 if saved.bf16 else torch.float32,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def world_size() -> int:
    """Number of ranks that torchrun started; 1 for a process started by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this is the rank that prints results and writes files."""
    return os.environ.get("RANK", "0") == "0"


def run_evaluate(args: argparse.Namespace) -> None:
    """``evaluate``: loss of a split, or a dump of logits."""
    from megatron_k2.engine.mcore.jobs import evaluate_job
    from megatron_k2.engine.mcore.saved_args import read_saved_args

    job = evaluate_job(args, world_size())
    _, saved = read_saved_args(job.directory, None)
    with process_group() as device, opened_model(job.directory, saved, job.layout) as model:
        if args.dump_logits is None:
            _evaluate(args, job, model, device)
        else:
            _dump_logits(args, job, model, device)


def _evaluate(
    args: argparse.Namespace, job: "EvaluateJob", model: "InferenceModel", device: "torch.device"
) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from megatron_k2.engine.mcore.evaluate import evaluate

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    is_shown = console.is_terminal and is_first_rank()
    with Progress(*columns, console=console, disable=not is_shown) as bar:
        task = bar.add_task("windows")
        result = evaluate(
            model,
            job.tokens,
            seq_length=job.seq_length,
            micro_batch_size=args.micro_batch_size,
            device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if is_first_rank():
        _show(args, job, result)


def _show(args: argparse.Namespace, job: "EvaluateJob", result: "Evaluation") -> None:
    from megatron_k2.engine.mcore.evaluate import read_bigram_baseline

    is_whole = args.split == "valid" and args.max_tokens is None  # what the baseline is over
    bigram = read_bigram_baseline(args.data) if is_whole else None
    print(
        f"{job.directory}: {args.split} loss {result.loss_nats:.6f} nats/token, "
        f"perplexity {result.perplexity:.3f}, {result.num_tokens:,} tokens"
    )
    if bigram is not None:
        print(f"bigram baseline {bigram:.6f}, difference {result.loss_nats - bigram:+.6f}")
    if args.json is not None:
        record = {
            **dataclasses.asdict(result),
            "perplexity": result.perplexity,
            "checkpoint": str(job.directory),
            "data": str(args.data),
            "split": args.split,
            "bigram_nats": bigram,
        }
        write_atomically(args.json, (json.dumps(record, indent=2) + "\n").encode())


def _dump_logits(
    args: argparse.Namespace, job: "EvaluateJob", model: "InferenceModel", device: "torch.device"
) -> None:
    from megatron_k2.engine.mcore.logits import dump_logits

    num_tokens = args.dump_sequences * job.seq_length
    tokens = job.tokens[:num_tokens].astype("int64").reshape(args.dump_sequences, job.seq_length)
    shape = dump_logits(model, tokens, args.dump_logits, device, is_writer=is_first_rank())
    if is_first_rank():
        print(f"{args.dump_logits}: logits {list(shape)}")


def run_generate(args: argparse.Namespace) -> None:
    """``generate``: the prompt and what follows it, on rank 0's stdout."""
    from megatron_k2.engine.mcore.jobs import generate_job
    from megatron_k2.engine.text import TextPieces

    job = generate_job(args, world_size())
    length = len(job.prompt) + args.max_new_tokens
    with continuing(job.directory, job.saved, job.layout, length) as continued:
        pieces = TextPieces(job.tokenizer, job.prompt)
        _print(args.prompt)
        for token in continued(job.prompt, job.params):
            _print(pieces.feed([token]))
        _print(pieces.close() + "\n")


def run_chat(args: argparse.Namespace) -> None:
    """``chat``: one answer, or a dialogue line by line, on rank 0's stdout."""
    from megatron_k2.engine.mcore.chat import Talk, chat_job, read_line, shown

    job = chat_job(args, world_size())
    length = job.saved.max_position_embeddings
    with continuing(job.directory, job.saved, job.layout, length) as continued:
        talk = Talk(continued, job, args, lambda e: None if args.json else _print(shown(e)))
        if args.prompt is None and args.messages is None:
            talk.converse(read_line)
            return
        completion = talk.answer()
        if args.json:
            _print(json.dumps(completion.to_message().to_object(), ensure_ascii=False) + "\n")
        elif not completion.is_finished:
            _print("\n")
        for finding in completion.findings if is_first_rank() else ():
            print(f"{finding.kind}: {finding.detail}", file=sys.stderr)


def _print(text: str) -> None:
    if is_first_rank():
        print(text, end="", flush=sys.stdout.isatty())


def main(argv: list[str]) -> int:
    """``evaluate …``, ``generate …`` or ``chat …``; 2 for a wrong input."""
    quieten()
    try:
        if argv[0] == "evaluate":
            run_evaluate(evaluate_parser().parse_args(argv[1:]))
        elif argv[0] == "chat":
            run_chat(chat_parser().parse_args(argv[1:]))
        else:
            run_generate(generate_parser().parse_args(argv[1:]))
    except UserError as error:
        return refuse(f"megatron-k2 {argv[0]}", error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
