"""``megatron-k2 convert``: checkpoints between Hugging Face and Megatron, and looks at either."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_k2.cli.convert_arguments import parser
from megatron_k2.errors import UserError
from megatron_k2.lock.directory import hold

if TYPE_CHECKING:
    from megatron_k2.checkpoint.hf.audit import SourceAudit
    from megatron_k2.checkpoint.stream.jobs import Progress
    from megatron_k2.checkpoint.verify.against_reference import LogitComparison
    from megatron_k2.checkpoint.verify.compare import Comparison


def _with_progress[Result](run: "Callable[[Progress], Result]") -> tuple[Result, float]:
    """Run with bytes and time left on stderr: a bar on a terminal, else a line now and then.

    Returns:
        What ``run`` returns, and seconds it took.
    """
    import time

    started = time.monotonic()
    if not sys.stderr.isatty():
        result = run(_lines(started))
        return result, time.monotonic() - started
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        *Progress.get_default_columns()[:2],
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("written")
        result = run(lambda done, total: bar.update(task, completed=done, total=total))
    return result, time.monotonic() - started


def _lines(started: float, every_seconds: float = 5.0) -> "Progress":
    """Progress for a log file."""
    import time

    said_at = started
    done_before: int | None = None  # found finished: says nothing about speed

    def say(done: int, total: int) -> None:
        nonlocal said_at, done_before
        now = time.monotonic()
        if done_before is None:
            done_before = done
        if now - said_at < every_seconds or done == done_before:
            return
        said_at = now
        rate = (done - done_before) / (now - started)
        print(
            f"{done / 1e9:,.1f} of {total / 1e9:,.1f} GB written, {rate / 1e9:.2f} GB/s, "
            f"{(total - done) / rate:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return say


def _project(name: str | None, num_bytes: int, seconds: float, bytes_per_element: float) -> None:
    """What the same would take for a whole preset, at the rate just measured."""
    if name is None:
        return
    from megatron_k2.planning.cost.params import count_parameters
    from megatron_k2.presets import get_preset

    projected = count_parameters(get_preset(name)).total * bytes_per_element
    hours = projected / (num_bytes / seconds) / 3600
    print(
        f"{name} at this rate ({num_bytes / seconds / 1e9:.2f} GB/s written): "
        f"{hours:.1f} h, {projected / 1e12:.2f} TB of disk"
    )


def _import(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
    from megatron_k2.checkpoint.convert.peft_files import is_peft
    from megatron_k2.checkpoint.names.selection import Selection

    if is_peft(args.hf_dir):
        return _import_adapter(args)
    if args.base is not None:
        raise UserError(f"--base {args.base}: {args.hf_dir} is no adapter of PEFT's; drop it")
    options = ImportOptions(
        preset=args.preset,
        dtype=args.dtype,
        modules=args.modules,
        only=Selection.parse(args.only),
        num_workers=args.workers,
        check_finite=args.check_finite,
    )
    with hold(args.megatron_dir, "a conversion", is_beside=True):
        result, seconds = _with_progress(
            lambda progress: import_hf(args.hf_dir, args.megatron_dir, options, progress)
        )
    print(
        f"{result.directory}: {result.audit.num_targets} tensors of {result.preset.name}'s kind, "
        f"{result.num_files} files, {result.total_size_bytes / 1e9:.3f} GB, {seconds:.1f} s"
    )
    print(_accounted(result.audit))
    for note in result.notes:
        print(note)
    if result.scale_classes:
        print(f"FP8 scales by block: {_listed(result.scale_classes)}; kept in hf_source/")
    _project(args.project, result.total_size_bytes, seconds, 2.0)
    return 0


def _import_adapter(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.convert.peft_files import import_peft

    if args.base is None:
        raise UserError(f"{args.hf_dir} is an adapter: give --base RUN, whose weights it changes")
    with hold(args.megatron_dir, "a conversion", is_beside=True):
        made = import_peft(args.hf_dir, args.megatron_dir, args.base, args.preset)
    print(
        f"{made.directory}: {made.num_tensors} tensors of adapters; train on with --load "
        f"{made.directory} --lora-rank {made.rank} --lora-alpha {made.alpha:g}"
    )
    return 0


def _export_adapter(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.convert.peft_files import export_peft
    from megatron_k2.checkpoint.lora.adapters import AdapterSource
    from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
    from megatron_k2.run.iterations import find_iteration

    directory = find_iteration(args.megatron_dir, args.iteration)
    adapters = AdapterSource(MegatronSource(directory), args.base)
    made = export_peft(adapters, args.hf_dir, args.preset)
    print(
        f"{made.directory}: an adapter of PEFT's, {made.num_tensors} tensors of rank {made.rank}, "
        f"alpha {made.alpha:g}; the whole model: --merge-lora"
    )
    if made.left_out:
        print(f"left out: {len(made.left_out)} of prediction layers, which transformers lacks")
    return 0


def _holds_adapters(args: argparse.Namespace) -> bool:
    from megatron_k2.checkpoint.lora.adapters import is_adapters
    from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
    from megatron_k2.run.iterations import find_iteration

    return is_adapters(MegatronSource(find_iteration(args.megatron_dir, args.iteration)))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.items())


def _accounted(found: "SourceAudit") -> str:
    text = (
        f"{found.num_tensors:,} source tensors: {found.num_weights:,} weights, "
        f"{found.num_scales:,} FP8 scales"
    )
    if found.ignored:
        kind = found.ignored[0].rpartition("self_attn.")[2]
        text += f", {len(found.ignored):,} leftover buffers ignored on purpose ({kind})"
    return text


def _export(args: argparse.Namespace) -> int:
    with hold(args.hf_dir, "a conversion", is_beside=True):
        return _export_held(args)


def _export_held(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
    from megatron_k2.checkpoint.names.selection import Selection

    if _holds_adapters(args):
        if not args.merge_lora:
            return _export_adapter(args)
    elif args.merge_lora or args.base is not None:
        given = "--merge-lora" if args.merge_lora else "--base"
        raise UserError(f"{given}: {args.megatron_dir} holds a whole model, no adapters; drop it")
    options = ExportOptions(
        preset=args.preset,
        iteration=args.iteration,
        dtype=args.dtype,
        model_type=args.model_type,
        use_yarn=args.yarn,
        tokenizer=args.tokenizer,
        source_release=args.source,
        max_shard_bytes=None if args.max_shard_gb is None else int(args.max_shard_gb * 1e9),
        only=Selection.parse(args.only),
        num_workers=args.workers,
        check_finite=args.check_finite,
        base=args.base,
    )
    result, seconds = _with_progress(
        lambda progress: export(args.megatron_dir, args.hf_dir, options, progress)
    )
    print(
        f"{result.directory}: {result.num_tensors} tensors, {result.num_shards} shards, "
        f"{result.total_size_bytes / 1e9:.3f} GB, {seconds:.1f} s"
    )
    if result.blocks:
        kept, fresh = result.blocks.get("kept", 0), result.blocks.get("fresh", 0)
        rounding = ", up to a power of two" if result.has_power_of_two_scales else ""
        print(
            f"FP8 blocks: {kept:,} untouched, with their source's scale and codes; {fresh:,} "
            f"quantised anew (scale = amax / 448{rounding})"
        )
    _project(args.project, result.total_size_bytes, seconds, 1.0 if args.dtype == "fp8" else 2.0)
    return 0


def _audit(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.hf.audit import audit_source, released_tensors
    from megatron_k2.checkpoint.hf.release import open_release
    from megatron_k2.presets import get_preset

    if (args.hf_dir is None) == (args.preset is None):
        raise UserError("convert audit takes either a Hugging Face directory or --preset NAME")
    if args.preset is not None:
        preset = get_preset(args.preset)
        found = audit_source(released_tensors(preset), preset)
    else:
        release = open_release(args.hf_dir)
        found = audit_source(release.source.stored, release.preset)
        for note in release.notes:
            print(note)
    print(f"{_accounted(found)} -> {found.num_targets:,} Megatron tensors")
    for finding in found.findings[:20]:
        print(f"  {finding}")
    print(f"{len(found.findings) or 'none'} left over")
    return 1 if found.findings else 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.names.selection import Selection
    from megatron_k2.checkpoint.verify.compare import compare, open_weights

    weights = [open_weights(directory, args.preset) for directory in (args.a, args.b)]
    found = compare(weights[0], weights[1], Selection.parse(args.only))
    is_same = _print_comparison(found, args.rows, args.tolerance)
    if args.logits:
        from megatron_k2.engine.mcore.compare_logits import compare_logits

        logits = compare_logits(args.a, args.b, dtype=args.logits_dtype)
        is_same &= _print_logits(logits, args.logit_tolerance)
    return 0 if is_same else 1


def _print_comparison(found: "Comparison", num_rows: int, tolerance: float) -> bool:
    from megatron_k2.terminal import show, table

    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            print(f"{len(names)} tensors only in {side}: {', '.join(names[:3])}")
    differing = [difference for difference in found.differences if not difference.is_equal]
    if differing:
        listed = table("tensor", "relative difference", "max abs")
        for one in differing[:num_rows]:
            listed.add_row(one.name, f"{one.relative:.3e}", f"{one.max_abs:.3e}")
        show(listed)
    print(f"{found.num_equal} of {len(found.differences)} tensors equal, element for element")
    within = all(difference.relative <= tolerance for difference in differing)
    return within and not found.only_in_a and not found.only_in_b


def _print_logits(found: "LogitComparison", tolerance: float) -> bool:
    for kind, keys in (("missing", found.missing_keys), ("unexpected", found.unexpected_keys)):
        if keys:
            print(f"{len(keys)} {kind} keys: {', '.join(keys[:3])}")
    print(
        f"max |difference| {found.max_abs_difference:.3e} (tolerance {tolerance:.0e}), "
        f"mean {found.mean_abs_difference:.3e}, max |logit| {found.max_abs_reference:.3f}, "
        f"same argmax {found.argmax_agreement:.2%}"
        + (f", else apart by {found.largest_lost_margin:.3e}" if found.argmax_agreement < 1 else "")
    )
    is_same = found.max_abs_difference <= tolerance
    return is_same and not found.missing_keys and not found.unexpected_keys


def _verify_logits(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.verify.against_reference import verify_logits

    found = verify_logits(args.hf_dir, args.reference)
    return 0 if _print_logits(found, args.tolerance) else 1


def _inspect(args: argparse.Namespace) -> int:
    from megatron_k2.checkpoint.verify.inspect import inspect_checkpoint
    from megatron_k2.terminal import pairs, show, table

    found = inspect_checkpoint(args.directory, args.iteration)
    groups = table("tensors", "count", "shape", "dtype", "MB")
    for group in found.groups:
        groups.add_row(
            group.pattern,
            f"{group.count:,}",
            " ".join(str(list(shape)) for shape in group.shapes),
            " ".join(group.dtypes),
            f"{group.num_bytes / 1e6:,.3f}",
        )
    show(pairs(((name, str(value)) for name, value in found.facts.items()), indent=0), groups)
    print(f"{found.num_tensors:,} tensors, {found.num_bytes / 1e9:,.3f} GB")
    return 0


_COMMANDS = {
    "import": _import,
    "export": _export,
    "audit": _audit,
    "verify": _verify,
    "verify-logits": _verify_logits,
    "inspect": _inspect,
}


def main(argv: list[str]) -> int:
    """Run ``convert``; 1 from a comparison or an audit means: it ran, and found differences."""
    logging.basicConfig(format="%(message)s")
    from megatron_k2.checkpoint.stream.jobs import FinishedError

    args = parser().parse_args(argv)
    try:
        return _COMMANDS[args.command](args)
    except FinishedError as finished:
        print(f"{finished}; nothing to do")
        return 0
