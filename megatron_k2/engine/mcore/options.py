"""Command-line options that evaluation and generation share. Light: no torch."""

import argparse
from pathlib import Path

from megatron_k2.data.manifest import DataManifest, read_manifest
from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import MEGATRON_NAMES, Layout


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--load``, the number of ranks and Megatron's own layout flags."""
    parser.add_argument(
        "--load", type=Path, required=True, help="a run's --save directory, or an iter_* in it"
    )
    parser.add_argument("--iteration", type=int, help="default: the latest, by the tracker file")
    parser.add_argument("--nproc", type=int, default=1, help="ranks on this machine")
    group = parser.add_argument_group("layout", "any, whatever the checkpoint was saved at")
    meanings = {
        "tp": "TP, with sequence parallelism",
        "pp": "PP",
        "cp": "CP",
        "ep": "EP",
        "etp": "TP inside an expert",
    }
    for field, help_text in meanings.items():
        flag = f"--{MEGATRON_NAMES[field].replace('_', '-')}"
        group.add_argument(flag, dest=field, type=int, default=1, metavar="N", help=help_text)
    group.add_argument(
        "--pipeline-model-parallel-layout",
        dest="pipeline_layout",
        metavar="PIPELINE_MODEL_PARALLEL_LAYOUT",
        help="Megatron's, for layers that do not divide by PP",
    )


def layout_of(args: argparse.Namespace, world_size: int) -> Layout:
    """The layout flags of a parsed command line, over ``world_size`` ranks."""
    degrees = {field: getattr(args, field) for field in MEGATRON_NAMES}
    return Layout(world_size, pipeline_layout=args.pipeline_layout, **degrees)


def without_nproc(argv: list[str]) -> list[str]:
    """The ranks' options: torchrun takes ``--nproc`` for an abbreviation of one of its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc")
    return parser.parse_known_args(argv)[1]


def evaluate_parser() -> argparse.ArgumentParser:
    """The parser of ``megatron-k2 evaluate``, which every rank uses too."""
    parser = argparse.ArgumentParser(
        prog="megatron-k2 evaluate",
        allow_abbrev=False,
        description="Loss and perplexity of a Megatron checkpoint over all tokens of a split.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--data", type=Path, required=True, help="directory made by 'megatron-k2 data prepare'"
    )
    parser.add_argument("--split", default="valid", help="default: valid")
    parser.add_argument("--max-tokens", type=int, help="predict only the split's first N tokens")
    parser.add_argument("--seq-length", type=int, help="default: the one of training")
    parser.add_argument(
        "--micro-batch-size", type=int, default=8, help="windows at a time on a rank; default: 8"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument(
        "--dump-logits",
        type=Path,
        metavar="FILE.pt",
        help="instead: write tokens and logits for 'convert verify-logits'",
    )
    parser.add_argument(
        "--dump-sequences", type=int, default=2, help="sequences that --dump-logits takes"
    )
    return parser


def generate_parser() -> argparse.ArgumentParser:
    """The parser of ``megatron-k2 generate``, which every rank uses too."""
    parser = argparse.ArgumentParser(
        prog="megatron-k2 generate",
        allow_abbrev=False,
        description="Sample text from a Megatron checkpoint.",
    )
    add_model_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", type=Path, help="directory of the model's tokenizer")
    source.add_argument("--data", type=Path, help="dataset directory, whose tokenizer is taken")
    parser.add_argument("--prompt", required=True)
    _add_sampling_options(parser, max_new_tokens=64)
    return parser


def _add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument(
        "--temperature", type=float, default=0.6, help="0: greedy; default: 0.6, as K2's README"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus; default: 1, all tokens")
    parser.add_argument("--seed", type=int, default=0)


def chat_parser() -> argparse.ArgumentParser:
    """The parser of ``megatron-k2 chat --load``, which every rank uses too."""
    parser = argparse.ArgumentParser(
        prog="megatron-k2 chat",
        allow_abbrev=False,
        description="Talk to a Megatron checkpoint in K2's chat format: one turn with --prompt or "
        "--messages, else line by line. Calls of tools are shown and asked for, never executed.",
        epilog="'megatron-k2 chat render' and 'chat parse' convert files of dialogues.",
    )
    add_model_options(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tokenizer", type=Path, help="directory of the model's tokenizer")
    source.add_argument("--data", type=Path, help="directory of 'data chat' or 'data prepare'")
    parser.add_argument("--system", help="text of a system turn; default: the template's")
    parser.add_argument("--tools", type=Path, metavar="FILE.json", help="a list of OpenAI's tools")
    parser.add_argument("--prompt", help="one user turn, and its answer")
    parser.add_argument(
        "--messages", type=Path, metavar="FILE.json", help="a list of OpenAI's messages before it"
    )
    parser.add_argument("--json", action="store_true", help="the answer as one OpenAI message")
    _add_sampling_options(parser, max_new_tokens=256)
    return parser


def check_chat(args: argparse.Namespace) -> None:
    """Everything about ``chat``'s options that needs no model.

    Raises:
        UserError: a number out of range, or several ranks without a turn to answer.
    """
    _check_sampling(args)
    is_one_turn = args.prompt is not None or args.messages is not None
    if args.nproc > 1 and not is_one_turn:
        raise UserError(
            f"--nproc {args.nproc} without --prompt or --messages: ranks of torchrun have no "
            "terminal; give a turn, or one rank"
        )
    if args.json and not is_one_turn:
        raise UserError("--json is one answer; give --prompt or --messages")


def check_evaluate(args: argparse.Namespace) -> DataManifest:
    """Everything about ``evaluate``'s options that needs no model.

    Raises:
        UserError: a number out of range, no such dataset or split, an unwritable target.
    """
    for name in ("nproc", "micro_batch_size", "dump_sequences", "max_tokens", "seq_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    for name in ("json", "dump_logits"):
        path = getattr(args, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{name.replace('_', '-')} {path}: no directory {path.parent}")
    manifest = read_manifest(args.data)
    if args.split not in manifest.splits:
        have = ", ".join(manifest.splits)
        raise UserError(f"--split {args.split}: {args.data} has {have}")
    if manifest.splits[args.split].num_tokens < 2:
        raise UserError(f"--split {args.split} has fewer than 2 tokens: nothing to predict")
    return manifest


def check_generate(args: argparse.Namespace) -> Path:
    """Everything about ``generate``'s options that needs no model; returns the tokenizer's path.

    Raises:
        UserError: a number out of range, or no such dataset.
    """
    _check_sampling(args)
    if args.data is None:
        return Path(args.tokenizer)
    return Path(args.data) / read_manifest(args.data).tokenizer.path


def _check_sampling(args: argparse.Namespace) -> None:
    for name in ("nproc", "max_new_tokens"):
        if getattr(args, name) < 1:
            value = getattr(args, name)
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: 0 (greedy) or above is needed")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: above 0 and at most 1 is needed")
