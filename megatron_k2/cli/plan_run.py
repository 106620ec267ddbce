"""``megatron-k2 plan``: what a run on a cluster needs, and how long it takes, before its launch."""

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_k2.cli import plan_calibration
from megatron_k2.cli.plan_arguments import (
    MEASURED_NOTE,
    NOTE,
    fraction,
    parser,
    request_from,
    typed_efficiencies,
)
from megatron_k2.cli.plan_tables import (
    assumed_line,
    built_line,
    facts,
    memory_table,
    search_table,
    summary,
    title,
    update_facts,
    update_line,
)

if TYPE_CHECKING:
    from megatron_k2.planning.calibration import Basis
    from megatron_k2.planning.estimate import Assumptions, Estimate
    from megatron_k2.planning.request import RunRequest


def _fitted(r: "RunRequest", arguments: argparse.Namespace, b: "Basis") -> "RunRequest":
    """Offload as typed, or as little as fits."""
    from megatron_k2.planning.memory_fit import fit_to_memory

    fixed = {
        field: fraction(field, value)
        for field in ("activation_offload", "optimizer_offload")
        if (value := getattr(arguments, field)) != "auto"
    }
    r = r.replace(**fixed)
    r.check()
    return r if len(fixed) == 2 else fit_to_memory(r, b.used.reserved_gb, frozenset(fixed))


def _write_figures(e: "Estimate", a: "Assumptions", arguments: argparse.Namespace) -> list[str]:
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


def _searched(r: "RunRequest", b: "Basis", arguments: argparse.Namespace, tokens: float) -> Any:
    """The best layout, after its ranking was printed; ``None`` where that was all to print."""
    from megatron_k2.planning.search import search
    from megatron_k2.terminal import show

    found = search(r, b.used, arguments.top)
    if arguments.json:
        layouts = [facts(e, tokens) for e in found.best]
        print(json.dumps({"layouts": found.num_layouts, "best": layouts}, indent=2))
        return None
    show(
        f"{found.num_layouts:,} layouts and recompute choices, {found.num_fitting:,} fit; the "
        f"best by tokens/s on {r.world_size} x {r.gpu.name}:"
    )
    show(search_table(found, tokens))
    return found.best[0].request


def _print_plan(e: "Estimate", b: "Basis", tokens: float) -> None:
    """Memory and time; with measured rates both, theirs and the assumed."""
    from megatron_k2.planning.estimate import estimate
    from megatron_k2.terminal import show

    show(title(e.request))
    show(memory_table(e))
    show(summary(e, tokens))
    show(update_line(e.request, b.used))
    if b.record is None:
        show(assumed_line(e.request, b.used))
    else:
        show("", *plan_calibration.shown(e, estimate(e.request, b.assumed), b))


def _print_json(e: "Estimate", b: "Basis", tokens: float) -> None:
    from megatron_k2.planning.estimate import estimate

    printed = facts(e, tokens)
    printed["weight_update"] = update_facts(e.request, b.used)
    if b.record is not None:
        assumed = estimate(e.request, b.assumed)
        printed["calibration"] = plan_calibration.calibration_facts(e, assumed, b)
    print(json.dumps(printed, indent=2))


def main(argv: list[str]) -> int:
    """Print the plan, or the ranking."""
    extra = argv[argv.index("--") + 1 :] if "--" in argv else []
    arguments = parser().parse_args(argv[: len(argv) - len(extra)] if extra else argv)
    from megatron_k2.planning.calibration import basis
    from megatron_k2.planning.estimate import estimate
    from megatron_k2.planning.measured_rates import read_record
    from megatron_k2.terminal import show

    typed = typed_efficiencies(arguments.efficiency)
    record = read_record(Path(arguments.calibrate)) if arguments.calibrate else None
    r = request_from(arguments, record)
    b = basis(r.gpu, r.preset, typed, record)
    preset = r.preset.training
    tokens = arguments.tokens or preset.train_samples * preset.seq_length
    chosen = _searched(r, b, arguments, tokens) if arguments.search else _fitted(r, arguments, b)
    if chosen is None:
        return 0
    e = estimate(chosen, b.used)
    if arguments.print_args:
        from megatron_k2.flags.layout import megatron_flags

        print(" ".join(megatron_flags(chosen)))
        return 0
    if arguments.json:
        _print_json(e, b, tokens)
        return 0
    _print_plan(e, b, tokens)
    for line in _write_figures(e, b.used, arguments):
        show(f"wrote {line}")
    if arguments.dry_run:
        _print_dry_run(chosen, b.used, extra)
    print("\n" + textwrap.fill(NOTE if record is None else MEASURED_NOTE, 110))
    return 0
