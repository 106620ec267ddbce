"""One page on one run: six panels over the steps, drawn without a display."""

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from megatron_k2.run.console import duration

if TYPE_CHECKING:
    from megatron_k2.run.report.run import Run

INK, GREY, RULE = "#1b2733", "#6b7785", "#d9dee4"
BLUE, RED = "#2467a8", "#c8402f"
DEPTH = LinearSegmentedColormap.from_list("depth", ["#8fc7d9", "#2467a8", "#2a1a57"])
"""First layer to last: light to dark, readable in greyscale and to the colour-blind."""
NICE = [1, 2, 5, 10]
"""Distances of ticks, up to a power of ten."""
MAX_LAYERS_IN_LEGEND = 6
MAX_LINE_POINTS = 4000
"""A long run is drawn by as many steps: more than the pixels of a panel."""


def draw(run: "Run") -> bytes:
    """The report's figure of ``run``, six panels over steps, as bytes of a PNG."""
    figure = Figure(figsize=(13.5, 7.8), dpi=130, facecolor="white")
    axes = figure.subplots(2, 3, sharex=True)
    figure.subplots_adjust(0.055, 0.075, 0.98, 0.85, wspace=0.24, hspace=0.3)
    steps = np.array([record.iteration for record in run.records])
    panels: list[tuple[str, Callable[..., None]]] = [
        ("Loss, nats per token", _loss),
        ("Max attention logit, per layer", _max_logit),
        ("Expert load, busiest over mean, per layer", _load),
        ("Learning rate", _learning_rate),
        ("Heads clipped by QK-Clip, per step", _clipped),
        ("Tokens per second", _speed),
    ]
    for axis, (title, panel) in zip(axes.flat, panels, strict=True):
        style(axis, title)
        panel(axis, run, steps)
    for axis in axes[1]:
        axis.set_xlabel("step", color=GREY, fontsize=9)
    axes[0, 0].set_xlim(steps[0] - 0.5, max(steps[-1], steps[0] + 1))
    _headline(figure, run)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Running mean over the last 1/80 of the run, at least 4 steps; non-finite values left out.

    An exponential mean with the bias of its start corrected, so that the first value is the first
    of ``values`` and not a fraction of it.
    """
    decay = 1 - 1 / max(4.0, len(values) / 80)
    total = weight = 0.0
    result = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if math.isfinite(value):
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        if weight:
            result[i] = total / weight
    return result


def style(axis: Any, title: str) -> None:
    """A panel as this house draws it: title at the left, no frame, faint lines."""
    axis.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=9)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(RULE)
    axis.grid(axis="y", color=RULE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=GREY, labelsize=8.5, length=0, labelbottom=True)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=NICE))
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=NICE))


def _headline(figure: Figure, run: "Run") -> None:
    last = run.records[-1]
    figure.text(
        0.055, 0.945, run.directory.resolve().name, fontsize=17, color=INK, fontweight="bold"
    )
    facts = [
        run.preset,
        f"{last.iteration:,} steps",
        f"{last.consumed_tokens:,} tokens",
        f"loss {last.loss:.3f}",
        f"{duration(sum(record.seconds for record in run.records))} of training",
    ]
    figure.text(
        0.055, 0.912, "   ·   ".join(filter(None, facts)), fontsize=10, color=GREY, va="center"
    )


def _thin(*series: np.ndarray) -> tuple[np.ndarray, ...]:
    """Every k-th point, the last included, of series that share their steps."""
    stride = -(-len(series[0]) // MAX_LINE_POINTS)
    start = (len(series[0]) - 1) % stride
    return tuple(values[start::stride] for values in series)


def _raw_and_smooth(axis: Any, steps: np.ndarray, values: np.ndarray, color: str) -> np.ndarray:
    """What was measured, faint, under its running mean; returns the mean."""
    values = np.where(np.isfinite(values), values, np.nan)
    mean = smoothed(values.tolist())
    x, raw, line = _thin(steps, values, mean)
    axis.plot(x, raw, color=color, alpha=0.28, linewidth=0.8)
    axis.plot(x, line, color=color, linewidth=1.8)
    return mean


def _label(axis: Any, x: float, y: float, text: str, color: str, offset: int = 7) -> None:
    """``text`` just over the point, to its left."""
    axis.annotate(
        text,
        (x, y),
        xytext=(-2, offset),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=color,
        fontweight="bold",
    )


def _loss(axis: Any, run: "Run", steps: np.ndarray) -> None:
    losses = np.array([record.loss for record in run.records])
    mean = _raw_and_smooth(axis, steps, losses, BLUE)
    if np.isfinite(mean[-1]):
        _label(axis, steps[-1], mean[-1], f"{mean[-1]:.3f}", BLUE, offset=14)
    lost = steps[~np.isfinite(losses)]
    for step in lost[:50]:
        axis.axvline(step, color=RED, linewidth=0.8, alpha=0.5)
    if lost.size:
        axis.text(
            0.98,
            0.9,
            f"{lost.size} steps without a loss",
            color=RED,
            fontsize=9,
            ha="right",
            transform=axis.transAxes,
        )


def _learning_rate(axis: Any, run: "Run", steps: np.ndarray) -> None:
    x, y = _thin(steps, np.array([record.learning_rate for record in run.records]))
    axis.fill_between(x, y, color=BLUE, alpha=0.1, linewidth=0)
    axis.plot(x, y, color=BLUE, linewidth=1.8)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(FuncFormatter(_rate))


def _rate(rate: float, _position: int) -> str:
    """A learning rate for an axis: 1.5e-4; zero is 0."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}" if rate else "0"


def _clipped(axis: Any, run: "Run", steps: np.ndarray) -> None:
    counts = np.array([record.num_clipped_heads for record in run.records])
    axis.fill_between(steps, counts, step="mid", color=RED, alpha=0.85, linewidth=0.6)
    axis.set_ylim(0, max(1.0, counts.max() * 1.12))
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=NICE))
    total = int(counts.sum())
    text = f"{total:,} head-steps in all" if total else "none was ever clipped"
    axis.text(
        0.985,
        0.93,
        text,
        color=RED if total else GREY,
        fontsize=9,
        ha="right",
        transform=axis.transAxes,
    )


def _speed(axis: Any, run: "Run", steps: np.ndarray) -> None:
    speeds = np.array([record.tokens_per_second for record in run.records])
    _raw_and_smooth(axis, steps, speeds, BLUE)
    median = float(np.median(speeds))
    axis.axhline(median, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.set_ylim(0, float(np.percentile(speeds, 99.5)) * 1.2)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    axis.text(
        0.985,
        0.93,
        f"median {median:,.0f}",
        color=GREY,
        fontsize=9,
        ha="right",
        transform=axis.transAxes,
    )


def _layers(rows: list[tuple[float, ...]]) -> np.ndarray:
    """[steps, layers]; the steps that hold another number of layers than the last are empty."""
    width = len(rows[-1])
    empty = (math.nan,) * width
    table = np.array([row if len(row) == width else empty for row in rows], dtype=float)
    return np.where(np.isfinite(table), table, np.nan)


def _per_layer(
    axis: Any, steps: np.ndarray, table: np.ndarray, first_layer: int, *, smooth: bool
) -> None:
    num_layers = table.shape[1]
    last_layer = first_layer + num_layers - 1
    scale = Normalize(0, max(1, num_layers - 1))
    for i in range(num_layers):
        values = smoothed(table[:, i].tolist()) if smooth else table[:, i]
        x, y = _thin(steps, values)
        axis.plot(
            x,
            y,
            color=DEPTH(scale(i)),
            linewidth=1.2 if num_layers < 12 else 0.8,
            label=f"layer {first_layer + i}",
        )
    if num_layers <= MAX_LAYERS_IN_LEGEND:
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 1.045),
            ncols=num_layers,
            frameon=False,
            fontsize=8,
            labelcolor=GREY,
            handlelength=1.2,
            columnspacing=1.0,
            handletextpad=0.5,
        )
        return
    inset = axis.inset_axes((0.03, 0.955, 0.28, 0.025))
    bar = axis.figure.colorbar(ScalarMappable(scale, DEPTH), cax=inset, orientation="horizontal")
    bar.set_ticks([0, num_layers - 1], labels=[f"layer {first_layer}", str(last_layer)])
    bar.ax.tick_params(colors=GREY, labelsize=8, length=0)
    bar.outline.set_visible(False)


def _max_logit(axis: Any, run: "Run", steps: np.ndarray) -> None:
    table = _layers([record.max_logit_per_layer for record in run.records])
    if not table.size or np.isnan(table).all():
        _nothing(axis)
        return
    _per_layer(axis, steps, table, 1, smooth=False)
    highest = float(np.nanmax(table))
    threshold = run.threshold
    if threshold is not None:
        axis.axhline(threshold, color=RED, linewidth=1.1, linestyle=(0, (5, 3)))
        axis.text(
            0.012,
            threshold,
            f"threshold τ = {threshold:g}",
            color=RED,
            fontsize=8.5,
            va="bottom",
            transform=axis.get_yaxis_transform(),
        )
        highest = max(highest, threshold)
    axis.set_ylim(min(0.0, float(np.nanmin(table))), highest * 1.2)


def _load(axis: Any, run: "Run", steps: np.ndarray) -> None:
    table = _layers([record.load_max_over_mean_per_layer for record in run.records])
    if not table.size or np.isnan(table).all():
        _nothing(axis)
        return
    num_dense = len(run.records[-1].max_logit_per_layer) - table.shape[1]
    _per_layer(axis, steps, table, 1 + max(0, num_dense), smooth=True)
    # A first step far from balance would flatten the rest.
    top = float(np.nanpercentile(table, 99))
    axis.set_ylim(1.0, max(1.5, 1 + 1.25 * (top - 1)))


def _nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "not recorded", color=GREY, ha="center", transform=axis.transAxes)
