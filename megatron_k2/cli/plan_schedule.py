"""``megatron-k2 plan schedule``: the report's phases, their steps and rates, Megatron's flags."""

import argparse
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_k2.planning.phases import Phase


def facts(phases: "tuple[Phase, ...]") -> list[dict[str, Any]]:
    """Everything printed, for JSON; tokens, steps, rates."""
    return [
        {
            "name": phase.name,
            "tokens": phase.tokens,
            "steps": phase.steps,
            "seq_length": phase.seq_length,
            "global_batch_size": phase.sequences_per_step,
            "lr_start": phase.lr_at(0),
            "lr_highest": phase.lr,
            "lr_end": phase.lr_at(phase.tokens),
            "warmup_tokens": phase.warmup_tokens,
            "decay_tokens": phase.decay_tokens,
            "yarn": phase.has_yarn,
            "source": phase.source,
            "megatron_flags": phase.megatron_flags(),
        }
        for phase in phases
    ]


def draw(phases: "tuple[Phase, ...]") -> bytes:
    """Learning rate over tokens, as a PNG file's content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=130, facecolor="white")
    axis = figure.subplots()
    start = 0.0
    for phase, colour in zip(phases, ("#2467a8", "#c8402f", "#7d5a8a", "#6f9e5b"), strict=True):
        points = [phase.tokens * i / 2000 for i in range(2001)]
        axis.plot(
            [(start + tokens) / 1e12 for tokens in points],
            [phase.lr_at(tokens) for tokens in points],
            color=colour,
            label=f"{phase.name}: {phase.seq_length:,} tokens a sequence, {phase.steps:,} steps",
        )
        start += phase.tokens
    axis.set_yscale("log")
    axis.set_ylim(5e-6, 3e-4)
    axis.set_xlabel("tokens, 10¹²")
    axis.set_ylabel("learning rate")
    axis.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _table(rows: list[dict[str, Any]]) -> "Table":
    """A row for each phase; the rate at its start, at its highest and at its end."""
    from megatron_k2.terminal import table

    rates = ("lr_start", "lr_highest", "lr_end")
    found = table("phase", "tokens", "steps", "batch", "lr", "highest", "at the end", "YaRN")
    for row in rows:
        found.add_row(
            row["name"],
            f"{row['tokens'] / 1e12:.3f}T",
            f"{row['steps']:,}",
            f"{row['global_batch_size']:,} x {row['seq_length']:,}",
            *(f"{row[name]:.2e}" for name in rates),
            "on" if row["yarn"] else "off",
        )
    return found


def main(argv: list[str]) -> int:
    """``megatron-k2 plan schedule``: print the phases; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="megatron-k2 plan schedule",
        description="The report's training schedule (section 2.5): phases, steps, learning rate.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, with the flags")
    parser.add_argument("--flags", metavar="PHASE", help="print Megatron's flags of one phase")
    parser.add_argument("--png", metavar="FILE", help="draw the learning rate")
    arguments = parser.parse_args(argv)
    from megatron_k2.errors import UserError
    from megatron_k2.planning.phases import kimi_k2_phases
    from megatron_k2.terminal import pairs, show

    phases = kimi_k2_phases()
    if arguments.flags:
        named = {phase.name: phase for phase in phases}
        if arguments.flags not in named:
            raise UserError(f"--flags {arguments.flags}: expected one of {', '.join(named)}")
        print(" ".join(named[arguments.flags].megatron_flags()))
        return 0
    if arguments.json:
        print(json.dumps(facts(phases), indent=2))
        return 0
    rows = facts(phases)
    show(_table(rows), pairs((row["name"], row["source"]) for row in rows))
    if arguments.png:
        path = Path(arguments.png)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw(phases))
        print(f"wrote {path}")
    return 0
