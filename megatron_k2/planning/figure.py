"""One page on a plan: the schedule in the manner of the report's Figure 7, and the memory."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_k2.planning.schedule.timeline import LANES, Task, span

if TYPE_CHECKING:
    from megatron_k2.planning.estimate import Estimate

INK, GREY = "#1b2733", "#6b7785"
COLOURS = {
    "F attention": "#8fc7d9",
    "F MLP": "#2467a8",
    "B attention": "#f0b98d",
    "B MLP": "#c8402f",
    "B weight gradients": "#7d5a8a",
    "all-to-all": "#6f9e5b",
    "pipeline": "#b9a24c",
    "host copies": "#aab3bd",
}
MEMORY = {
    "weights": "#2a1a57",
    "gradients": "#2467a8",
    "optimizer": "#8fc7d9",
    "activations": "#c8402f",
    "reserved": "#d9dee4",
}
SHOWN_RANKS = 4


def _colour(task: Task) -> str:
    if task.lane == "arithmetic":
        return COLOURS[f"{task.unit.kind} {task.name}"]
    return COLOURS["host copies" if task.lane in ("to host", "from host") else task.lane]


def _rows(axis: Axes, tasks: Sequence[Task], ranks: list[int]) -> None:
    lanes = LANES if any(t.seconds and "host" in t.lane for t in tasks) else LANES[:3]
    height = len(lanes) + 0.6
    boxes, colours = [], []
    for task in tasks:
        if task.rank not in ranks or task.lane not in lanes or task.seconds == 0:
            continue
        y = ranks.index(task.rank) * height + lanes.index(task.lane)
        boxes.append([(task.start, y), (task.end, y), (task.end, y + 0.86), (task.start, y + 0.86)])
        colours.append(_colour(task))
    axis.add_collection(
        PolyCollection(boxes, facecolors=colours, edgecolors="white", linewidths=0.2)
    )
    axis.set_ylim(len(ranks) * height, -0.2)
    axis.set_yticks([i * height + 0.43 for i in range(len(ranks))])
    axis.set_yticklabels([f"rank {rank}" for rank in ranks], fontsize=8)


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.tick_params(colors=GREY, labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def draw_plan(e: "Estimate", tasks: Sequence[Task]) -> bytes:
    """The PNG file's content.

    Args:
        e: the plan.
        tasks: of ``trace.step_lanes``.
    """
    r = e.request
    figure = Figure(figsize=(14, 10), dpi=120, facecolor="white")
    whole, middle, memory = figure.subplots(3, 1, height_ratios=[2, 2, 1.3])
    figure.subplots_adjust(0.06, 0.06, 0.985, 0.93, hspace=0.38)
    ranks = sorted({0, *(round(i * (r.pp - 1) / (SHOWN_RANKS - 1)) for i in range(SHOWN_RANKS))})
    length = span(tasks)
    units = max(task.unit.microbatch for task in tasks) + 1
    for axis, window, title in (
        (
            whole,
            (0.0, length),
            f"One step of {units} micro-batches ({r.num_microbatches} in the run)",
        ),
        (middle, (0.48 * length, 0.53 * length), "Its middle: pairs of a forward and a backward"),
    ):
        inside = [task for task in tasks if task.end > window[0] and task.start < window[1]]
        _rows(axis, inside, ranks)
        axis.set_xlim(*window)
        axis.set_xlabel("seconds", fontsize=8, color=GREY)
        _style(axis, title)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
    whole.legend(handles=handles, ncols=len(COLOURS), fontsize=8, frameon=False, **place)
    _memory(memory, e)
    layout = f"TP {r.tp}  PP {r.pp}  VPP {r.vpp}  EP {r.ep}  CP {r.cp}"
    headline = (
        f"{r.preset.name} on {r.world_size} x {r.gpu.name}   {layout}   {e.step_seconds:.1f} s a "
        f"step, MFU {e.mfu:.1%} (a model, not measured)"
    )
    figure.suptitle(headline, x=0.06, ha="left", fontsize=12, color=INK)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _memory(axis: Axes, e: "Estimate") -> None:
    bottoms = [0.0] * len(e.memory)
    for name, colour in MEMORY.items():
        heights = [getattr(m, name) / 1e9 for m in e.memory]
        axis.bar(range(len(heights)), heights, bottom=bottoms, color=colour, label=name, width=0.8)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axis.axhline(e.request.gpu.memory_gb, color=INK, linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(bottoms)))
    axis.set_xlabel("pipeline rank", fontsize=8, color=GREY)
    axis.legend(ncols=5, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1.0))
    _style(axis, "GB on a GPU; dashed: its memory")
