"""``megatron-k2 plan``: what a run on a cluster needs, and how long it takes, before its launch."""

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

from megatron_k2.cli.plan_tables import (
    built_line,
    facts,
    memory_table,
    search_table,
    summary,
    title,
)

if TYPE_CHECKING:
    from megatron_k2.planning.estimate import Assumptions, Estimate
    from megatron_k2.planning.request import RunRequest

NOTE = (
    "Elements, bytes of states and FLOPs are exact; activations are the sum of what Megatron's "
    "Transformer Engine modules keep, with evenly loaded experts; seconds are FLOPs and bytes over "
    "the data sheet's rates times the efficiencies above, which are assumptions (--efficiency). "
    "Nothing here was measured on a GPU."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-k2 plan",
        description="Memory, time and layout of a run. Also: plan schedule, plan optimizer. "
        + NOTE,
    )
    parser.add_argument("--preset", required=True, help="see: megatron-k2 presets")
    parser.add_argument("--gpu", default="h800", help="h100, h200, h800 (default) or b200")
    parser.add_argument("--gpu-memory-gb", type=float, help="instead of the data sheet's")
    parser.add_argument("--gpu-tflops", type=float, help="dense bf16, instead of the data sheet's")
    parser.add_argument("--world-size", type=int, required=True, help="GPUs")
    batch = parser.add_argument_group("batch (default: the preset's)")
    batch.add_argument("--seq-length", type=int, help="tokens")
    batch.add_argument("--sequences-per-step", type=int, help="global batch size")
    batch.add_argument("--micro-batch-size", type=int, default=1, help="sequences")
    batch.add_argument(
        "--document-tokens",
        type=int,
        default=0,
        help="packed documents, as fine-tuning has them: tokens that attention reaches over",
    )
    layout = parser.add_argument_group("layout (default: the report's PP 16 x EP 16)")
    layout.add_argument("--tp", type=int, default=1)
    layout.add_argument("--pp", type=int, default=16)
    layout.add_argument("--vpp", type=int, default=2, help="virtual stages (report: not stated)")
    layout.add_argument("--ep", type=int, default=16)
    layout.add_argument("--cp", type=int, default=1)
    memory = parser.add_argument_group("memory (report, section 2.4.4)")
    memory.add_argument(
        "--transformer-impl",
        choices=["transformer_engine", "local"],
        default="transformer_engine",
        help="whose modules: they keep different tensors for their backward",
    )
    memory.add_argument(
        "--recompute",
        help="of norm, swiglu, mla_up; or none (default: all three; local: the first two)",
    )
    memory.add_argument("--no-fp8-storage", action="store_true", help="activations stay bf16")
    memory.add_argument(
        "--activation-offload", default="auto", help="part on the host, or auto: as much as needed"
    )
    memory.add_argument("--optimizer-offload", default="auto", help="likewise, after activations")
    memory.add_argument("--no-overlap", action="store_true", help="expert all-to-all not hidden")
    parser.add_argument(
        "--efficiency",
        default="",
        metavar="gemm=0.65,…",
        help="parts of the data sheet's rates: gemm, grouped, attention, network; elementwise adds",
    )
    parser.add_argument("--tokens", type=float, help="of the whole run (default: the preset's)")
    parser.add_argument("--search", action="store_true", help="rank every layout of these GPUs")
    parser.add_argument("--top", type=int, default=10, help="layouts shown by --search")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build every distinct rank at full size on the meta device; flags after -- go along",
    )
    parser.add_argument("--print-args", action="store_true", help="the plan as Megatron's flags")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--trace", metavar="FILE", help="Chrome/Perfetto trace of one step")
    parser.add_argument("--png", metavar="FILE", help="the same step drawn, and the memory")
    return parser


def request_from(arguments: argparse.Namespace) -> "RunRequest":
    """The run that was typed, before anything is fitted to memory."""
    from dataclasses import replace

    from megatron_k2.planning.gpus import get_gpu
    from megatron_k2.planning.request import RunRequest
    from megatron_k2.presets import get_preset

    preset, gpu = get_preset(arguments.preset), get_gpu(arguments.gpu)
    if arguments.gpu_memory_gb:
        gpu = replace(gpu, memory_gb=arguments.gpu_memory_gb)
    if arguments.gpu_tflops:
        gpu = replace(gpu, bf16_tflops=arguments.gpu_tflops)
    everything = "norm,swiglu" if arguments.transformer_impl == "local" else "norm,swiglu,mla_up"
    names: Any = (arguments.recompute or everything).replace(" ", "").split(",")
    return RunRequest(
        preset=preset,
        gpu=gpu,
        world_size=arguments.world_size,
        seq_length=arguments.seq_length or preset.training.seq_length,
        sequences_per_step=arguments.sequences_per_step or preset.training.global_batch_size,
        tp=arguments.tp,
        pp=arguments.pp,
        vpp=arguments.vpp if arguments.pp > 1 else 1,
        ep=arguments.ep,
        cp=arguments.cp,
        micro_batch_size=arguments.micro_batch_size,
        document_tokens=arguments.document_tokens,
        recompute=frozenset() if names == ["none"] else frozenset(names),
        fp8_storage=not arguments.no_fp8_storage,
        modules=arguments.transformer_impl,
        has_overlap=not arguments.no_overlap,
    )


def _fitted(r: "RunRequest", arguments: argparse.Namespace, a: "Assumptions") -> "RunRequest":
    """Offload as typed, or as little as fits."""
    from megatron_k2.planning.memory_fit import fit_to_memory

    fixed = {
        field: _fraction(field, value)
        for field in ("activation_offload", "optimizer_offload")
        if (value := getattr(arguments, field)) != "auto"
    }
    r = r.replace(**fixed)
    r.check()
    return r if len(fixed) == 2 else fit_to_memory(r, a.reserved_gb, frozenset(fixed))


def _fraction(field: str, value: str) -> float:
    from megatron_k2.errors import UserError

    try:
        return float(value)
    except ValueError:
        flag = "--" + field.replace("_", "-")
        raise UserError(f"{flag} {value}: a fraction from 0 to 1, or auto, is expected") from None


def assumptions_from(text: str) -> "Assumptions":
    """``gemm=0.7,network=0.8`` over the defaults.

    Raises:
        UserError: for an unknown name or a value that is not a positive number.
    """
    from dataclasses import fields, replace

    from megatron_k2.errors import UserError
    from megatron_k2.planning.estimate import Assumptions

    known = [field.name for field in fields(Assumptions)]
    changes = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise UserError(f"--efficiency {name}: expected one of {', '.join(known)}")
        try:
            changes[name] = float(value)
        except ValueError:
            raise UserError(f"--efficiency {part}: expected {name}=NUMBER") from None
        if changes[name] <= 0:
            raise UserError(f"--efficiency {part}: a number above 0 is expected")
    return replace(Assumptions(), **changes)


def _write_figures(e: "Estimate", a: "Assumptions", arguments: argparse.Namespace) -> list[str]:
    from pathlib import Path

    written = []
    if arguments.trace:
        from megatron_k2.planning.trace import step_lanes, write_trace

        write_trace(Path(arguments.trace), step_lanes(e.request, a))
        written.append(f"{arguments.trace}  (open in ui.perfetto.dev or chrome://tracing)")
    if arguments.png:
        from megatron_k2.planning.figure import draw_plan
        from megatron_k2.planning.trace import step_lanes

        path = Path(arguments.png)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_plan(e, step_lanes(e.request, a)))
        written.append(arguments.png)
    return written


def _print_dry_run(r: "RunRequest", a: "Assumptions", extra: list[str]) -> None:
    """A line a distinct rank as it is built."""
    from megatron_k2.training.dry_run import SUBSTITUTES, dry_run

    print("\ndry run: every distinct pipeline rank, built by Megatron on the meta device")
    for theirs, ours in SUBSTITUTES:
        print(f"  {theirs} -> {ours}")
    total = 0
    for built in dry_run(r, extra, a.reserved_gb):
        print(built_line(built, r), flush=True)
        experts = r.ep * built.parameters.expert_muon
        total += len(built.ranks) * (
            built.parameters.total - built.parameters.expert_muon + experts
        )
    if r.tp == 1:
        _check_total(r, total)


def _check_total(r: "RunRequest", total: int) -> None:
    from megatron_k2.errors import UserError
    from megatron_k2.planning.cost.params import count_parameters

    expected = count_parameters(r.preset).trainable
    if total != expected:
        raise UserError(f"all ranks together hold {total:,} parameters, the model {expected:,}")
    print(f"  all ranks together: {total:,} parameters, the model's own number")


def main(argv: list[str]) -> int:
    """Print the plan, or the ranking."""
    extra = argv[argv.index("--") + 1 :] if "--" in argv else []
    arguments = _parser().parse_args(argv[: len(argv) - len(extra)] if extra else argv)
    from megatron_k2.planning.estimate import estimate
    from megatron_k2.planning.search import search
    from megatron_k2.terminal import show

    a = assumptions_from(arguments.efficiency)
    r = request_from(arguments)
    preset = r.preset.training
    tokens = arguments.tokens or preset.train_samples * preset.seq_length
    if arguments.search:
        found = search(r, a, arguments.top)
        if arguments.json:
            layouts = [facts(e, tokens) for e in found.best]
            print(json.dumps({"layouts": found.num_layouts, "best": layouts}, indent=2))
            return 0
        show(
            f"{found.num_layouts:,} layouts and recompute choices, {found.num_fitting:,} fit; the "
            f"best by tokens/s on {r.world_size} x {r.gpu.name}:"
        )
        show(search_table(found, tokens))
        r = found.best[0].request
    else:
        r = _fitted(r, arguments, a)
    e = estimate(r, a)
    if arguments.print_args:
        from megatron_k2.flags.layout import megatron_flags

        print(" ".join(megatron_flags(r)))
        return 0
    if arguments.json:
        print(json.dumps(facts(e, tokens), indent=2))
        return 0
    show(title(r))
    show(memory_table(e))
    show(summary(e, a, tokens))
    for line in _write_figures(e, a, arguments):
        show(f"wrote {line}")
    if arguments.dry_run:
        _print_dry_run(r, a, extra)
    print("\n" + textwrap.fill(NOTE, 110))
    return 0
