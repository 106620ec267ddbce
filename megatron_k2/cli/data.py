"""``megatron-k2 data prepare | inspect | baseline``."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_k2.data.manifest import DataManifest


def _parser() -> argparse.ArgumentParser:
    from megatron_k2.data.sources import DEFAULT_SUFFIXES

    parser = argparse.ArgumentParser(prog="megatron-k2 data")
    verbs = parser.add_subparsers(dest="verb", required=True)

    prepare = verbs.add_parser(
        "prepare",
        help="text, JSONL or directories to Megatron indexed datasets",
        description="Tokenize documents into train.bin/.idx and valid.bin/.idx with an EOD after "
        "each. Killed and run again, it goes on where it was.",
    )
    source = prepare.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="text, .jsonl, .json, .gz of them, directories",
    )
    source.add_argument(
        "--python-stdlib", action="store_true", help="this interpreter's own source (12 MB)"
    )
    prepare.add_argument("--output", type=Path, required=True, metavar="DIR")
    tokenizer = prepare.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="K2's or any Hugging Face tokenizer"
    )
    tokenizer.add_argument(
        "--train-bpe", type=int, metavar="VOCAB_SIZE", help="train a byte-level BPE on the inputs"
    )
    prepare.add_argument("--json-key", metavar="KEY", help="field of a JSON object (default: text)")
    prepare.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of documents, by hash of their path (default: %(default)s)",
    )
    prepare.add_argument(
        "--valid-input",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="an explicit validation set instead",
    )
    prepare.add_argument(
        "--suffix",
        nargs="+",
        default=list(DEFAULT_SUFFIXES),
        help=f"files taken from directories (default: {' '.join(DEFAULT_SUFFIXES)})",
    )
    prepare.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )

    inspect = verbs.add_parser("inspect", help="print what a dataset directory holds")
    inspect.add_argument("directory", type=Path, metavar="DIR")

    baseline = verbs.add_parser("baseline", help="unigram and bigram loss of the validation split")
    baseline.add_argument("directory", type=Path, metavar="DIR")
    return parser


def _table(title: str, manifest: "DataManifest") -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("split")
    for column in ("documents", "tokens", "tokens/document", "MB"):
        table.add_column(column, justify="right")
    for name, split in manifest.splits.items():
        table.add_row(
            name,
            f"{split.num_documents:,}",
            f"{split.num_tokens:,}",
            f"{split.num_tokens / split.num_documents:,.0f}",
            f"{(split.bin_bytes + split.idx_bytes) / 1e6:,.1f}",
        )
    return table


def _print_manifest(directory: Path, manifest: "DataManifest") -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    tokenizer, source = manifest.tokenizer, manifest.source
    console.print(_table(str(directory), manifest))
    console.print(
        f"tokenizer  {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}, "
        f"EOD {tokenizer.eod_id}, sha256 {tokenizer.identity[:16]}"
    )
    console.print(
        f"source     {source.description}: {source.num_files:,} files, "
        f"{source.num_bytes / 1e6:,.1f} MB, {source.num_empty_documents:,} empty documents left "
        f"out, sha256 {source.content_sha256[:16]}"
    )


def _prepare(arguments: argparse.Namespace) -> int:
    from megatron_k2.data.prepare import PrepareOptions, prepare

    options = PrepareOptions(
        output=arguments.output,
        inputs=tuple(arguments.input or ()),
        use_python_stdlib=arguments.python_stdlib,
        valid_inputs=tuple(arguments.valid_input),
        tokenizer=arguments.tokenizer,
        train_bpe=arguments.train_bpe,
        json_key=arguments.json_key,
        validation_fraction=arguments.validation_fraction,
        suffixes=tuple(arguments.suffix),
        num_workers=arguments.workers,
    )
    _print_manifest(arguments.output, prepare(options))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_k2.data.manifest import read_manifest

    _print_manifest(arguments.directory, read_manifest(arguments.directory))
    return 0


def _baseline(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from megatron_k2.data.indexed import read_sequence_lengths, read_tokens
    from megatron_k2.data.manifest import read_manifest
    from megatron_k2.data.ngram import BASELINE_FILE, held_out_tokens, interpolated_bigram
    from megatron_k2.errors import UserError
    from megatron_k2.files import write_atomically

    directory: Path = arguments.directory
    manifest = read_manifest(directory)
    if "valid" not in manifest.splits:
        raise UserError(f"{directory} has no validation split; prepare it with one")
    train, valid = (directory / manifest.splits[name].prefix for name in ("train", "valid"))
    result = interpolated_bigram(
        read_tokens(train),
        read_tokens(valid),
        manifest.tokenizer.vocab_size,
        held_out_tokens(read_sequence_lengths(train)),
    )
    write_atomically(
        directory / BASELINE_FILE, (json.dumps(asdict(result), indent=2) + "\n").encode()
    )
    print(f"unigram  {result.unigram_nats:.4f} nats per token (add-one)")
    print(f"bigram   {result.bigram_nats:.4f} nats per token (weight {result.weight:.4f})")
    print(f"over {result.num_valid_tokens:,} validation tokens -> {directory / BASELINE_FILE}")
    return 0


def main(argv: list[str]) -> int:
    """Run one of the three; see ``megatron-k2 data --help``."""
    arguments = _parser().parse_args(argv)
    verbs = {"prepare": _prepare, "inspect": _inspect, "baseline": _baseline}
    return verbs[arguments.verb](arguments)
