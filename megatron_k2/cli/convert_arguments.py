"""The command line of ``megatron-k2 convert``."""

import argparse
import math
import os
from pathlib import Path

from megatron_k2.presets import PRESETS

MOST_WORKERS = 8
"""Unless asked for more: by then a disk, not a core, is what waits."""


def parser() -> argparse.ArgumentParser:
    """One sub-command a direction, and the looks."""
    whole = argparse.ArgumentParser(
        prog="megatron-k2 convert",
        description="checkpoints between Hugging Face and Megatron, and looks at either",
    )
    commands = whole.add_subparsers(dest="command", required=True)
    _add_import(commands.add_parser("import", help="Hugging Face directory -> Megatron"))
    _add_export(commands.add_parser("export", help="Megatron checkpoint -> Hugging Face directory"))
    _add_audit(commands.add_parser("audit", help="account for every tensor; nothing is written"))
    _add_verify(commands.add_parser("verify", help="compare two checkpoints of either kind"))
    _add_verify_logits(
        commands.add_parser("verify-logits", help="compare an export with reference logits")
    )
    _add_inspect(commands.add_parser("inspect", help="what a checkpoint of either kind holds"))
    return whole


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return number


def _add_conversion(command: argparse.ArgumentParser) -> None:
    """Add the options that import and export share."""
    command.add_argument(
        "--workers",
        type=int,
        default=min(MOST_WORKERS, os.cpu_count() or 1),
        help=f"processes (default: one a core, at most {MOST_WORKERS})",
    )
    _add_only(command)
    command.add_argument(
        "--check-finite", action="store_true", help="refuse NaN and infinite weights"
    )
    command.add_argument(
        "--project", choices=PRESETS, help="print what this preset would take at the rate measured"
    )


def _add_only(command: argparse.ArgumentParser) -> None:
    command.add_argument("--only", help="a part: 'layers.0-3', 'experts.0-7', or both with a comma")


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "hf_dir",
        type=Path,
        help="safetensors and config.json; bf16, fp32 or FP8; or an adapter of PEFT's, with --base",
    )
    command.add_argument("megatron_dir", type=Path, help="directory to create, for Megatron's load")
    command.add_argument(
        "--preset", choices=PRESETS, help="name to save with it; default: the one of this shape"
    )
    command.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="default: as stored, FP8 becomes bf16"
    )
    command.add_argument(
        "--base", type=Path, help="of an adapter: the run or import whose weights it changes"
    )
    command.add_argument(
        "--modules",
        choices=("local", "te"),
        default="local",
        help="whose modules the loading model is built of (--transformer-impl): Megatron's own or "
        "Transformer Engine's, which store some norms under other names",
    )
    _add_conversion(command)


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "megatron_dir", type=Path, help="Megatron's --save directory, or an iter_* in it"
    )
    command.add_argument("hf_dir", type=Path, help="directory to create")
    command.add_argument(
        "--preset", choices=PRESETS, help="default: what the checkpoint's args say"
    )
    command.add_argument("--iteration", type=int, help="default: the latest, by the tracker file")
    command.add_argument(
        "--merge-lora",
        action="store_true",
        help="of a run of adapters: the whole model with them added; else they alone, as PEFT's",
    )
    command.add_argument(
        "--base", type=Path, help="of a run of adapters: where its base lies, if it has moved"
    )
    command.add_argument("--dtype", choices=("bf16", "fp32", "fp8"), default="bf16")
    command.add_argument(
        "--model-type",
        choices=("kimi_k2", "deepseek_v3"),
        help="default: the source's, else kimi_k2 as released; deepseek_v3 loads in transformers "
        "without remote code",
    )
    command.add_argument(
        "--source",
        type=Path,
        help="where config fields, tokenizer and FP8 scales come from; default: the directory the "
        "run's weights were imported from",
    )
    command.add_argument(
        "--tokenizer", type=Path, help="directory whose tokenizer files are copied"
    )
    command.add_argument(
        "--yarn",
        action=argparse.BooleanOptionalAction,
        help="position encoding is YaRN's; default: what the checkpoint's args say",
    )
    command.add_argument(
        "--max-shard-gb", type=_positive, help="cut shards by size; default: one layer a shard"
    )
    _add_conversion(command)


def _add_audit(command: argparse.ArgumentParser) -> None:
    command.add_argument("hf_dir", type=Path, nargs="?", help="Hugging Face directory")
    command.add_argument("--preset", choices=PRESETS, help="the release's layout, generated")


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", type=Path, metavar="A")
    command.add_argument("b", type=Path, metavar="B")
    command.add_argument("--preset", choices=PRESETS, help="where a checkpoint saved no arguments")
    command.add_argument("--rows", type=int, default=10, help="of the table of differences")
    command.add_argument(
        "--tolerance", type=float, default=0.0, help="largest relative difference that passes"
    )
    command.add_argument(
        "--logits", action="store_true", help="also run both models on the same tokens"
    )
    command.add_argument(
        "--logits-dtype", choices=("fp32", "bf16"), default="fp32", help="to compute in"
    )
    command.add_argument("--logit-tolerance", type=float, default=1e-4, help="largest |difference|")
    _add_only(command)


def _add_verify_logits(command: argparse.ArgumentParser) -> None:
    command.add_argument("hf_dir", type=Path)
    command.add_argument(
        "--reference",
        type=Path,
        required=True,
        help="torch.save of {'tokens': int64 [b,s], 'logits': fp32 [b,s,V]}",
    )
    command.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest |difference| allowed"
    )


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", type=Path)
    command.add_argument("--iteration", type=int, help="of a Megatron checkpoint")
