"""One page on a self-check: differences under their bars, Newton-Schulz, one triangle, the plan."""

import io
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Page

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.planning.measured_rates import SelfcheckRecord, read_record
from megatron_k2.selfcheck.findings import Figure, Findings

INK, GREY, RULE = "#1b2733", "#6b7785", "#d9dee4"
BLUE, RED, LIGHT = "#2467a8", "#c8402f", "#8fc7d9"
SMALLEST = 1e-9
"""Where a difference of zero is drawn."""
COLOURS = {
    "ours": BLUE,
    "ours, one triangle": "#2a1a57",
    "torch.optim.Muon": "#b9a24c",
    "Emerging-Optimizers": "#6f9e5b",
}


def draw_file(path: Path) -> Path:
    """Draw the record in ``path`` beside it.

    Raises:
        UserError: for a file that is no record.
    """
    record = read_record(path)
    target = path.with_suffix(".png")
    write_atomically(target, draw(record, _findings(record, path)))
    return target


def _findings(record: SelfcheckRecord, path: Path) -> dict[str, Findings]:
    try:
        return {str(step["name"]): Findings.from_json(step) for step in record.steps}
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: its steps are not selfcheck's; copy selfcheck.json again"
        ) from None


def draw(record: SelfcheckRecord, steps: dict[str, Findings]) -> bytes:
    """Four panels, those that have figures, as bytes of a PNG."""
    every = [figure for findings in steps.values() for figure in findings.figures]
    panels = [
        ("Differences, and what they must stay under", _bars_met, _with_bars(every)),
        ("Newton-Schulz of Kimi K2's matrices, ms", _newton_schulz, _timed(every)),
        ("One triangle by Triton, times torch's product", _one_triangle, _triangles(every)),
        ("Measured over planned or over a copy", _planned, _beside(every)),
    ]
    shown = [panel for panel in panels if panel[2]]
    page = Page(figsize=(13.5, 4.6 * max(1, (len(shown) + 1) // 2)), dpi=130, facecolor="white")
    axes = page.subplots(max(1, (len(shown) + 1) // 2), 2, squeeze=False)
    page.subplots_adjust(0.2, 0.09, 0.98, 0.84, wspace=0.62, hspace=0.34)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, panel, figures) in zip(axes.flat, shown, strict=False):
        _style(axis, title)
        panel(axis, figures)
    verdicts = [findings.verdict for findings in steps.values()]
    said = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    page.text(0.02, 0.955, f"megatron-k2 selfcheck on {record.device.name}", color=INK, fontsize=15)
    versions = record.versions
    known = [f"torch {versions.get('torch')}", f"CUDA {versions.get('cuda')}", versions.get("date")]
    page.text(0.02, 0.92, f"{said}; {', '.join(map(str, known))}", color=GREY, fontsize=10)
    buffer = io.BytesIO()
    FigureCanvasAgg(page).print_png(buffer)
    return buffer.getvalue()


def _with_bars(figures: Iterable[Figure]) -> list[Figure]:
    return [f for f in figures if f.bar is not None and 0 < f.bar < 1]


def _timed(figures: Iterable[Figure]) -> list[Figure]:
    return [f for f in figures if f.unit == "ms"]


def _triangles(figures: Iterable[Figure]) -> list[Figure]:
    return [f for f in figures if f.unit == "x torch's"]


def _beside(figures: Iterable[Figure]) -> list[Figure]:
    return [f for f in figures if f.beside and f.unit != "ms" and f.bar is None]


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", color=INK, fontsize=11)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(RULE)
    axis.tick_params(colors=GREY, labelsize=8, length=0)
    axis.grid(axis="x", color=RULE, linewidth=0.6)
    axis.set_axisbelow(True)


def _name_rows(axis: Axes, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)


def _bars_met(axis: Axes, figures: list[Figure]) -> None:
    for row, figure in enumerate(figures):
        assert figure.bar is not None
        value = max(figure.value, SMALLEST)
        axis.plot([value, figure.bar], [row, row], color=LIGHT, linewidth=2)
        axis.plot(value, row, "o", color=BLUE if figure.is_met else RED, markersize=6)
        axis.plot(figure.bar, row, "|", color=INK, markersize=11)
    axis.set_xscale("log")
    _name_rows(axis, [f.name for f in figures])


def _newton_schulz(axis: Axes, figures: list[Figure]) -> None:
    split = [_label_and_shape(f.name) for f in figures]
    rows = list(dict.fromkeys(shape for _, shape in split))
    labels = list(dict.fromkeys(label for label, _ in split))
    for (label, shape), figure in zip(split, figures, strict=True):
        at = rows.index(shape) + 0.16 * (labels.index(label) - (len(labels) - 1) / 2)
        is_first = label not in axis.get_legend_handles_labels()[1]
        shown = label if is_first else None
        axis.plot(figure.value, at, "o", markersize=7, color=COLOURS.get(label, GREY), label=shown)
    axis.set_xscale("log")
    _name_rows(axis, rows)
    axis.legend(frameon=False, fontsize=8, labelcolor=GREY, loc="lower right")


def _label_and_shape(name: str) -> tuple[str, str]:
    for label in sorted(COLOURS, key=len, reverse=True):
        if name.startswith(f"{label}, "):
            return label, name.removeprefix(f"{label}, ")
    return name, ""


def _one_triangle(axis: Axes, figures: list[Figure]) -> None:
    values = [figure.value for figure in figures]
    axis.barh(range(len(values)), values, 0.7, color=[BLUE if v >= 1 else LIGHT for v in values])
    axis.axvline(1, color=INK, linewidth=0.8)
    _name_rows(axis, [f.name.removeprefix("symmetric ") for f in figures])


def _planned(axis: Axes, figures: list[Figure]) -> None:
    parts = [figure.value / figure.beside for figure in figures if figure.beside]
    axis.barh(range(len(parts)), parts, 0.6, color=BLUE)
    axis.axvline(1, color=INK, linewidth=0.8)
    _name_rows(axis, [f"{f.name} ({f.beside_what})" for f in figures])
