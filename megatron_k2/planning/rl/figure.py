"""One page on an iteration: what every GPU does when, which answers decode, and the memory."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_k2.planning.rl.iteration import starts
from megatron_k2.planning.rl.memory import ON_GPU
from megatron_k2.planning.rl.simulate import Rollout

if TYPE_CHECKING:
    from megatron_k2.planning.rl.iteration import RlPlan

INK, GREY = "#1b2733", "#6b7785"
NEW, RESUMED, READING = "#8fc7d9", "#2467a8", "#b9a24c"
PARTS = {
    "states to host": "#aab3bd",
    "update": "#6f9e5b",
    "weights to host": "#aab3bd",
    "rollout": NEW,
    "back to GPU": "#aab3bd",
    "pi_old": "#f0b98d",
    "train": "#c8402f",
}
MEMORY = {
    "weights": "#2a1a57",
    "gradients": "#2467a8",
    "optimizer": "#8fc7d9",
    "activations": "#c8402f",
    "engine_weights": "#6f9e5b",
    "cache": "#b9d8ac",
    "buckets": "#b9a24c",
    "reserved": "#d9dee4",
    "residue": "#aab3bd",
}
BINS = 600
"""Of the rollout's seconds, in which answers are averaged."""


def draw_iteration(plan: "RlPlan") -> bytes:
    """The PNG file's content."""
    figure = Figure(figsize=(14, 10), dpi=120, facecolor="white")
    grid = figure.add_gridspec(3, 1, height_ratios=[1, 1, 1.1])
    figure.subplots_adjust(0.06, 0.06, 0.985, 0.91, hspace=0.42)
    longest = max(plan.seconds, plan.waited_seconds)
    cases = (
        ("partial rollouts", plan.rollouts[-1], plan.seconds, plan.rollout_seconds),
        ("every answer waited for", plan.waited[-1], plan.waited_seconds, None),
    )
    for number, (name, rollout, seconds, planned) in enumerate(cases):
        axis = figure.add_subplot(grid[number])
        _iteration(axis, plan, rollout, rollout.seconds if planned is None else planned)
        axis.set_xlim(0, longest * 1.02)
        cut = f", {rollout.cut_off} answers go on in the next" if rollout.cut_off else ""
        _style(axis, f"{name}: {seconds:.0f} s{cut}")
    _legend(figure)
    _memory(figure.add_subplot(grid[2]), plan)
    r, e = plan.request, plan.request.engines
    figure.suptitle(
        f"{r.trainer.preset.name} on {r.world_size} x {r.trainer.gpu.name}   {e.replicas} engines "
        f"of {e.gpus} GPUs   {r.groups} x {r.group_size} answers an iteration, "
        f"{r.groups_in_play} prompts in play   {plan.gpu_hours:.1f} GPU-hours (a model, not "
        "measured)",
        x=0.06,
        ha="left",
        fontsize=12,
        color=INK,
    )
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _iteration(axis: Axes, plan: "RlPlan", rollout: Rollout, seconds: float) -> None:
    """A band of parts, and above it how many answers each moment of the sampling decodes."""
    slots = plan.request.engines.replicas * plan.request.engines.slots
    high = max(1, min(slots, plan.request.groups_in_play * plan.request.group_size))
    parts = [p if p.name != "rollout" else type(p)(p.name, rollout.seconds) for p in plan.parts]
    for part, start in zip(parts, starts(parts), strict=True):
        axis.broken_barh(
            [(start, part.seconds)], (-0.16 * high, 0.13 * high), color=PARTS[part.name]
        )
        if part.name == "rollout":
            _answers(axis, rollout, start)
    axis.set_ylim(-0.2 * high, 1.05 * high)
    axis.set_yticks([tick for tick in axis.get_yticks() if 0 <= tick <= high])
    axis.set_ylabel("answers decoding", fontsize=8, color=GREY)
    axis.set_xlabel("seconds", fontsize=8, color=GREY)


def _answers(axis: Axes, rollout: Rollout, start: float) -> None:
    new, resumed = binned(rollout, BINS)
    width = rollout.seconds / BINS
    edges = [start + i * width for i in range(BINS + 1)]
    both = [a + b for a, b in zip(new, resumed, strict=True)]
    axis.stairs(both, edges, fill=True, color=NEW)
    axis.stairs(resumed, edges, fill=True, color=RESUMED)


def binned(rollout: Rollout, bins: int) -> tuple[list[float], list[float]]:
    """Mean answers that decode in each of so many equal pieces: (new ones, resumed ones)."""
    width = rollout.seconds / bins
    new, resumed = [0.0] * bins, [0.0] * bins
    for stretch in rollout.stretches:
        end = min(stretch.end, rollout.seconds)
        for place in range(int(stretch.start / width), min(bins, int(end / width) + 1)):
            low, high = max(stretch.start, place * width), min(end, (place + 1) * width)
            part = max(0.0, high - low) / width
            resumed[place] += part * stretch.resumed
            new[place] += part * (stretch.answers - stretch.resumed)
    return new, resumed


def _legend(figure: Figure) -> None:
    names: dict[str, str] = {}
    for name, colour in PARTS.items():
        names.setdefault(colour, name if colour != "#aab3bd" else "states moved")
    names[NEW] = "new answers"
    names[RESUMED] = "resumed answers"
    handles = [Patch(color=colour, label=name) for colour, name in names.items()]
    figure.legend(
        handles=handles,
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        loc="upper right",
        bbox_to_anchor=(0.985, 0.945),
    )


def _memory(axis: Axes, plan: "RlPlan") -> None:
    phases, total = plan.memory.phases, plan.request.trainer.gpu.memory_gb
    lefts = [0.0] * len(phases)
    shown: Sequence[str] = [n for n in ON_GPU if any(getattr(p, n) for p in phases)]
    for name in shown:
        widths = [getattr(phase, name) / 1e9 for phase in phases]
        label = name.replace("_", " ")
        axis.barh(range(len(phases)), widths, left=lefts, color=MEMORY[name], label=label)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axis.axvline(total, color=INK, linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(phases)))
    axis.set_yticklabels([f"{p.phase}\nhost {p.on_host / 1e9:.0f}" for p in phases])
    axis.invert_yaxis()
    axis.legend(
        ncols=len(shown), fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1.0)
    )
    axis.set_xlim(0, total * 1.02)
    _style(axis, "GB by phase; dashed: a GPU's memory")


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.tick_params(colors=GREY, labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
