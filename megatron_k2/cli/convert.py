"""``megatron-k2 convert export`` and ``convert verify-logits``."""

import argparse
import logging
from pathlib import Path

from megatron_k2.presets import PRESETS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-k2 convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    out = commands.add_parser("export", help="Megatron checkpoint -> Hugging Face directory")
    out.add_argument(
        "megatron_dir", type=Path, help="Megatron's --save directory, or an iter_* in it"
    )
    out.add_argument("hf_dir", type=Path, help="directory to create")
    out.add_argument("--preset", choices=PRESETS, help="default: what the checkpoint's args say")
    out.add_argument("--iteration", type=int, help="default: the latest, by the tracker file")
    out.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    out.add_argument(
        "--model-type",
        choices=("kimi_k2", "deepseek_v3"),
        default="kimi_k2",
        help="kimi_k2 as released; deepseek_v3 loads in transformers without remote code",
    )
    out.add_argument("--tokenizer", type=Path, help="directory whose tokenizer files are copied")
    out.add_argument(
        "--yarn",
        action=argparse.BooleanOptionalAction,
        help="position encoding is YaRN's; default: what the checkpoint's args say",
    )

    check = commands.add_parser("verify-logits", help="compare an export with reference logits")
    check.add_argument("hf_dir", type=Path)
    check.add_argument(
        "--reference",
        type=Path,
        required=True,
        help="torch.save of {'tokens': int64 [b,s], 'logits': fp32 [b,s,V]}",
    )
    check.add_argument("--tolerance", type=float, default=1e-4, help="largest |difference| allowed")
    return parser


def _export(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from megatron_k2.checkpoint.export import ExportOptions, export

    options = ExportOptions(
        preset=args.preset,
        iteration=args.iteration,
        dtype=args.dtype,
        model_type=args.model_type,
        use_yarn=args.yarn,
        tokenizer=args.tokenizer,
    )
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards")
        result = export(
            args.megatron_dir,
            args.hf_dir,
            options,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    gigabytes = result.total_size_bytes / 1e9
    print(
        f"{result.directory}: {result.num_tensors} tensors, {result.num_shards} shards, "
        f"{gigabytes:.3f} GB"
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.verify import verify_logits

    found = verify_logits(args.hf_dir, args.reference)
    for kind, keys in (("missing", found.missing_keys), ("unexpected", found.unexpected_keys)):
        if keys:
            print(f"{len(keys)} {kind} keys: {', '.join(keys[:3])}")
    print(
        f"max |difference| {found.max_abs_difference:.3e} (tolerance {args.tolerance:.0e}), "
        f"mean {found.mean_abs_difference:.3e}, max |logit| {found.max_abs_reference:.3f}, "
        f"same argmax {found.argmax_agreement:.2%}"
    )
    is_same = found.max_abs_difference <= args.tolerance
    return 0 if is_same and not found.missing_keys and not found.unexpected_keys else 1


def main(argv: list[str]) -> int:
    """Run ``convert``; 1 from ``verify-logits`` means: loaded, but not the same model."""
    logging.basicConfig(format="%(message)s")
    args = _parser().parse_args(argv)
    return _export(args) if args.command == "export" else _verify(args)
