"""``megatron-k2 plan optimizer``: who orthogonalises what at any world size, and what it costs."""

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from megatron_k2.parallel.layout import Layout

ASSUMPTIONS = (
    "Layers are split as in the plan of a whole run (planning/schedule/chunks.py, our choice). "
    "Buffers are in Megatron's default buckets; data-parallel ranks include context-parallel ones. "
    "FLOPs are those Newton-Schulz executes, a multiply-add counted as two. /item: the largest "
    "load over the larger of the mean and the costliest matrix; /floor, of both groups together: "
    "over the larger of the mean and the costliest dense matrix on top of one rank's experts, "
    "which stay where they lie. Bytes are a rank's and a step's: out and back in bf16, mean and "
    "largest (sent or received); ZeRO-1's are fp32 gradients scattered and bf16 parameters "
    "gathered over the same ranks, AdamW's included."
)

TERA = 1e12

HEADINGS = (
    "group",
    "matrices",
    "TFLOP total",
    "mean",
    "max",
    "max/mean",
    "/item",
    "/floor",
    "padding",
    "MB out mean",
    "max",
    "back mean",
    "max",
    "ZeRO-1 MB",
)


def facts(preset_name: str, layout: "Layout", tflops: float | None) -> dict[str, Any]:
    """Everything printed.

    Args:
        preset_name: a model's.
        layout: ranks.
        tflops: assumed rate of a rank, TFLOP/s; ``None``: no seconds.
    """
    from megatron_k2.planning.muonclip.model import plan_model
    from megatron_k2.presets import get_preset

    preset = get_preset(preset_name)
    plans = plan_model(preset, layout)
    stages = [plan.summary() for plan in plans]
    if tflops is not None:
        for stage in stages:
            stage["seconds"] = stage["flops_max"] / (tflops * 1e12)
    return {
        "preset": preset.name,
        "world_size": layout.world_size,
        "tensor_parallel": layout.tp,
        "pipeline_parallel": layout.pp,
        "expert_parallel": layout.ep,
        "matrices": sum(plan.num_matrices * len(plan.stages) for plan in plans),
        "tflops": tflops,
        "stages": stages,
    }


def _row(group: dict[str, Any]) -> list[str]:
    mega = 1e6
    ranks = f"{group['tensor_ranks']}x{group['data_ranks']}"
    copies = f"{group['groups']} x " if group["groups"] > 1 else ""
    return [
        f"{copies}{group['kind']} {ranks}",
        f"{group['matrices']}",
        f"{group['flops_total'] / TERA:.1f}",
        f"{group['flops_mean'] / TERA:.2f}",
        f"{group['flops_max'] / TERA:.2f}",
        f"{group['max_over_mean']:.3f}",
        f"{group['max_over_item_bound']:.3f}",
        "",
        f"{group['padding']:.5f}",
        f"{group['exchange_out_mean_bytes'] / mega:.1f}",
        f"{group['exchange_out_max_bytes'] / mega:.1f}",
        f"{group['exchange_back_mean_bytes'] / mega:.1f}",
        f"{group['exchange_back_max_bytes'] / mega:.1f}",
        f"{group['zero1_bytes'] / mega:.1f}",
    ]


def _both(stage: dict[str, Any]) -> list[str]:
    """A rank's load of both matrix groups together."""
    mean, most = stage["flops_mean"] / TERA, stage["flops_max"] / TERA
    over = f"{stage['max_over_mean']:.3f}", "", f"{stage['max_over_floor']:.3f}"
    return ["both, a rank", "", "", f"{mean:.2f}", f"{most:.2f}", *over, *[""] * 6]


def _title(stage: dict[str, Any]) -> str:
    first, last = stage["stages"][0], stage["stages"][-1]
    which = f"stage {first}" if first == last else f"stages {first}-{last}"
    extras = [name for name in ("embedding", "head") if stage[name]]
    return ", ".join([f"{which}: {stage['layers']} layers", *extras])


def shown(found: dict[str, Any]) -> "list[RenderableType]":
    """The table for a terminal: a stage's matrix groups, and both together."""
    from megatron_k2.terminal import table

    has_seconds = found["tflops"] is not None
    seconds = [f"s at {found['tflops']:g} TFLOP/s"] if has_seconds else []
    whole = table(*HEADINGS, *seconds)
    whole.padding = (0, 1, 0, 0)
    for stage in found["stages"]:
        whole.add_section()
        whole.add_row(_title(stage))
        for group in stage["groups"]:
            whole.add_row(*_row(group))
        time = [f"{stage['seconds']:.3f}"] if has_seconds else []
        whole.add_row(*_both(stage), *time)
    return [
        f"MuonClip's plan: {found['preset']}, {found['world_size']} ranks, TP "
        f"{found['tensor_parallel']}, PP {found['pipeline_parallel']}, EP "
        f"{found['expert_parallel']}; {found['matrices']:,} matrices, each with one home",
        whole,
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-k2 plan", description="Plans, before a run.")
    verbs = parser.add_subparsers(dest="what", required=True)
    optimizer = verbs.add_parser(
        "optimizer",
        help="MuonClip at any world size: homes, balance and bytes exchanged",
        description="MuonClip's plan for a whole model, on this CPU. " + ASSUMPTIONS,
    )
    optimizer.add_argument("--preset", required=True, help="see: megatron-k2 presets")
    optimizer.add_argument("--world-size", type=int, required=True, help="ranks")
    optimizer.add_argument("--tp", type=int, default=1, help="tensor parallel (default 1)")
    optimizer.add_argument("--pp", type=int, default=1, help="pipeline parallel (default 1)")
    optimizer.add_argument("--vpp", type=int, default=1, help="virtual stages (default 1)")
    optimizer.add_argument("--ep", type=int, default=1, help="expert parallel (default 1)")
    optimizer.add_argument(
        "--etp", type=int, default=1, help="expert tensor parallel: only 1 is planned"
    )
    optimizer.add_argument("--tflops", type=float, help="assumed rate of a rank: prints seconds")
    optimizer.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def main(argv: list[str]) -> int:
    """Print the plan: of a whole run, of its schedule (``schedule``) or of MuonClip."""
    if argv[:1] == ["schedule"]:
        from megatron_k2.cli import plan_schedule

        return plan_schedule.main(argv[1:])
    if not argv or argv[0].startswith("-"):
        from megatron_k2.cli import plan_run

        return plan_run.main(argv)
    arguments = _parser().parse_args(argv)
    from megatron_k2.errors import UserError

    if arguments.etp != 1:
        raise UserError(
            f"--etp {arguments.etp}: expert tensor parallelism is not planned; use --etp 1"
        )
    if arguments.tflops is not None and arguments.tflops <= 0:
        raise UserError(f"--tflops {arguments.tflops:g}: a rate above 0 is expected")
    from megatron_k2.parallel.layout import Layout
    from megatron_k2.terminal import show

    layout = Layout(
        arguments.world_size, arguments.tp, arguments.pp, arguments.ep, vpp=arguments.vpp
    )
    found = facts(arguments.preset, layout, arguments.tflops)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(*shown(found))
        print(textwrap.fill(ASSUMPTIONS, 100))
    return 0
