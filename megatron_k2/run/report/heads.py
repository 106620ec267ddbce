"""The largest logit of every head over the steps: which heads grow, and which are clipped.

Two panels: layers x heads at the last recorded step, and all heads (layer by layer) against steps.
The colour is S_max over the threshold, so that white is the threshold and red is above it.
"""

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

INK, GREY = "#1b2733", "#6b7785"
HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.0, "#2a1a57"), (0.28, "#2467a8"), (0.5, "#f7f7f7"), (1.0, "#c8402f")]
)
MAX_COLUMNS = 2000
"""A long run is drawn by as many steps: more than the pixels of a panel."""


def draw_heads(
    steps: list[int], max_logits: list[list[list[float]]], threshold: float | None
) -> bytes:
    """The PNG file's content.

    Args:
        steps: iterations that were recorded.
        max_logits: S_max of each [step][layer][head]; -inf where nothing was recorded.
        threshold: τ; by default the largest logit seen, so that nothing is red.
    """
    values = np.array(max_logits, dtype=float)
    values[~np.isfinite(values)] = np.nan
    tau = threshold or float(np.nanmax(values))
    stride = -(-len(steps) // MAX_COLUMNS)
    steps, values = steps[::stride], values[::stride]
    num_layers, num_heads = values.shape[1:]

    figure = Figure(figsize=(13.5, 5.2), dpi=130, facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.7])
    figure.subplots_adjust(0.055, 0.12, 0.915, 0.82, wspace=0.16)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=tau, vmax=1.25 * tau)
    image = left.imshow(values[-1], cmap=HEAT, norm=norm, aspect="auto", interpolation="nearest")
    right.imshow(
        values.reshape(len(steps), -1).T,
        cmap=HEAT,
        norm=norm,
        aspect="auto",
        interpolation="nearest",
        extent=(steps[0], max(steps[-1], steps[0] + 1), num_layers, 0),
    )
    _label(left, f"Step {steps[-1]:,}", "head", "layer")
    _label(right, f"All {num_layers * num_heads:,} heads, layer by layer", "step", "layer")
    left.set_yticks(range(num_layers), [str(i + 1) for i in range(num_layers)])
    right.set_yticks(np.arange(num_layers) + 0.5, [str(i + 1) for i in range(num_layers)])
    for axis in (left, right):
        if num_layers > 20:
            axis.set_yticks(axis.get_yticks()[::10])
    bar = figure.colorbar(image, cax=figure.add_axes((0.927, 0.12, 0.012, 0.7)))
    bar.set_ticks([0, tau / 2, tau, 1.25 * tau], labels=["0", "τ/2", f"τ = {tau:g}", "1.25 τ"])
    bar.outline.set_visible(False)  # type: ignore[operator]
    figure.suptitle(
        "Largest attention logit of each head", x=0.055, ha="left", color=INK, fontweight="bold"
    )
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    axis.set_xlabel(x, color=GREY, fontsize=9)
    axis.set_ylabel(y, color=GREY, fontsize=9)
    axis.tick_params(colors=GREY, labelsize=8, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
