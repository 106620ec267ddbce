"""``megatron-k2 data prepare | chat | inspect | baseline``."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_k2.data.manifest import DataManifest
    from megatron_k2.sft.manifest import ChatManifest


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

    _add_chat(verbs)
    inspect = verbs.add_parser("inspect", help="print what a dataset directory holds")
    inspect.add_argument("directory", type=Path, metavar="DIR")

    baseline = verbs.add_parser("baseline", help="unigram and bigram loss of the validation split")
    baseline.add_argument("directory", type=Path, metavar="DIR")
    return parser


def _add_chat(verbs: Any) -> None:
    chat = verbs.add_parser(
        "chat",
        help="dialogues with tools to packed sequences for fine-tuning",
        description="Dialogues (OpenAI's or ShareGPT's form, .jsonl, .json, .parquet) to tokens "
        "with a loss mask, packed. What is left out stands in rejects.jsonl with line and reason. "
        "Killed and run again, it goes on where it was.",
    )
    chat.add_argument("--input", type=Path, nargs="+", required=True, metavar="PATH")
    chat.add_argument("--output", type=Path, required=True, metavar="DIR")
    chat.add_argument(
        "--tokenizer", type=Path, required=True, metavar="PATH", help="with K2's control tokens"
    )
    chat.add_argument(
        "--sequence-length", type=int, required=True, metavar="N", help="positions of a sequence"
    )
    chat.add_argument(
        "--multiple",
        type=int,
        default=1,
        metavar="N",
        help="pad each dialogue's positions to this, 2 x the context-parallel size (default: 1)",
    )
    chat.add_argument("--pack", default="best-fit", help="best-fit (default), first-fit or none")
    chat.add_argument(
        "--too-long", default="drop", help="drop (default), truncate or refuse what is longer"
    )
    chat.add_argument(
        "--train-on", default="all", help="all of an assistant's turns (default), or the last"
    )
    chat.add_argument(
        "--call-ids",
        default="number",
        help="number tool calls as K2's (default), or keep the ids given",
    )
    chat.add_argument("--template", default="0905", help="0905 (default), 0905-first or 0711")
    chat.add_argument("--declarations", default="json", help="of tools: json (default), typescript")
    chat.add_argument("--validation-fraction", type=float, default=0.05, metavar="F")
    chat.add_argument("--valid-input", type=Path, nargs="+", default=[], metavar="PATH")
    chat.add_argument("--workers", type=int, default=os.cpu_count() or 1)


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


def _chat(arguments: argparse.Namespace) -> int:
    from megatron_k2.chat.template import Format
    from megatron_k2.sft.prepare import prepare_chat
    from megatron_k2.sft.prepare_plan import ChatOptions

    options = ChatOptions(
        output=arguments.output,
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        sequence_length=arguments.sequence_length,
        valid_inputs=tuple(arguments.valid_input),
        form=Format(arguments.template, arguments.declarations),
        multiple=arguments.multiple,
        method=arguments.pack,
        too_long=arguments.too_long,
        trained=arguments.train_on,
        call_ids=arguments.call_ids,
        validation_fraction=arguments.validation_fraction,
        num_workers=arguments.workers,
    )
    _print_chat_manifest(arguments.output, prepare_chat(options))
    return 0


def _print_chat_manifest(directory: Path, manifest: "ChatManifest") -> None:
    from megatron_k2.terminal import show, table

    listed = table(
        *("split", "dialogues", "tokens", "trained", "sequences", "fill"), title=str(directory)
    )
    for name, split in manifest.splits.items():
        listed.add_row(
            name,
            f"{split.num_samples:,}",
            f"{split.num_tokens:,}",
            f"{split.num_trained_tokens / split.num_tokens:.1%}",
            f"{split.num_sequences:,}",
            f"{split.fill:.2%}",
        )
    source, packing = manifest.source, manifest.packing
    left_out = ", ".join(f"{kind} {number:,}" for kind, number in source.rejected.items())
    show(
        listed,
        f"packing    {packing.method}, {packing.sequence_length:,} positions, dialogues padded to "
        f"a multiple of {packing.multiple}",
        f"source     {source.description}: {source.num_read:,} rows read, left out: "
        f"{left_out or 'none'}; truncated: {source.num_truncated:,}",
        f"tokenizer  {manifest.tokenizer.kind}, sha256 {manifest.tokenizer.identity[:16]}; "
        f"template {manifest.template['generation']}",
    )


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_k2.data.manifest import read_manifest
    from megatron_k2.sft import manifest as chat

    if (arguments.directory / chat.MANIFEST_FILE).is_file():
        _print_chat_manifest(arguments.directory, chat.read_manifest(arguments.directory))
        return 0
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
    """Run one of the four; see ``megatron-k2 data --help``."""
    arguments = _parser().parse_args(argv)
    verbs = {"prepare": _prepare, "chat": _chat, "inspect": _inspect, "baseline": _baseline}
    return verbs[arguments.verb](arguments)
