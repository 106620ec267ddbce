"""A run of RL as one picture, and as a page of its answers beside the curves."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.rl.history import Row
from megatron_k2.rl.record import Group, Trajectory
from megatron_k2.run.report.figure import BLUE, GREY, INK, RED, style
from megatron_k2.run.report.page import trajectories_page

REPORT, PAGE = "report.png", "report.html"
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Verdict of what was sampled, by task set", ("rl/verdict/",)),
    ("Held-out verdict, temperature 1 and greedy", ("eval/",)),
    ("Tokens of an answer", ("rl/tokens/",)),
    ("Surprise of what was drawn, nats", ("rl/surprise", "learn/entropy")),
    ("Engine against trainer, nats a token", ("learn/mismatch",)),
    ("KL to pi_old, estimate", ("learn/kl",)),
    ("NLL of the PTX set, nats a token", ("learn/ptx_nll",)),
    ("Temperature", ("rl/temperature/",)),
    ("Seconds of an iteration, by phase", ("seconds/",)),
)
"""Title, and beginnings of the metrics that are drawn together."""
_COLOURS = (BLUE, RED, "#3a8f5c", "#8a5fb0", "#b8862b", GREY)
_CURVES = ("rl/verdict/", "eval/", "rl/tokens/", "learn/kl", "learn/mismatch", "learn/ptx_nll")


def draw(rows: Sequence[Row], title: str) -> bytes:
    """The picture, a PNG.

    Raises:
        UserError: no iteration is there to draw.
    """
    if not rows:
        raise UserError("no iteration to draw yet; the run has not finished its first")
    figure = Figure(figsize=(13.5, 9.6), dpi=120, facecolor="white")
    axes = figure.subplots(3, 3, sharex=True)
    figure.subplots_adjust(0.05, 0.06, 0.985, 0.9, wspace=0.2, hspace=0.32)
    figure.text(0.05, 0.955, title, fontsize=14, color=INK, fontweight="bold")
    for axis, (name, beginnings) in zip(axes.flat, PANELS, strict=True):
        style(axis, name)
        _panel(axis, rows, beginnings)
    for axis in axes[-1]:
        axis.set_xlabel("iteration", color=GREY, fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _panel(axis: Any, rows: Sequence[Row], beginnings: Sequence[str]) -> None:
    found = curves(rows, beginnings)
    shown = {name: points for name, points in found.items() if _is_mean(name)}
    for number, (name, points) in enumerate(shown.items()):
        beginning = next(each for each in beginnings if name.startswith(each))
        label = name.removeprefix(beginning) or name.rpartition("/")[2]
        xs, ys = zip(*points, strict=True)
        colour = _COLOURS[number % len(_COLOURS)]
        marker = "o" if len(points) < 30 else ""
        axis.plot(xs, ys, color=colour, linewidth=1.4, marker=marker, markersize=3, label=label)
    if not shown:
        axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color=GREY)
    elif len(shown) > 1:
        axis.legend(fontsize=8, frameon=False)


def _is_mean(name: str) -> bool:
    return not name.endswith(("_tokens", "_unknown"))


def curves(
    rows: Sequence[Row], beginnings: Sequence[str] = _CURVES
) -> dict[str, list[tuple[float, float]]]:
    """Points of every metric whose name begins so, by name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in sorted(row.metrics.items()):
            if any(name.startswith(each) for each in beginnings):
                found.setdefault(name, []).append((row.iteration, value))
    return found


def page_rows(
    groups: Sequence[Group], iteration: int, text_of: Callable[[list[int]], str]
) -> list[Mapping[str, Any]]:
    """Answers of an iteration as the page of trajectories shows them.

    Args:
        groups: that it trained on.
        iteration: its number.
        text_of: ids to text, control tokens by their names.
    """
    return [
        {
            "task_id": group.task_id,
            "domain": group.task_set,
            "iteration": iteration,
            "messages": _messages(each, text_of),
            "end": each.end.value,
            "outcome": _outcome(each),
            "reward": each.reward,
            "evidence": ", ".join(f"{name} {value:g}" for name, value in each.parts.items()),
            "reason": each.reason,
            "ordinal": group.ordinal,
            "versions": sorted({s.weight_version for s in each.segments if s.is_sampled}),
        }
        for group in groups
        for each in group.trajectories
    ]


def _outcome(trajectory: Trajectory) -> str:
    if trajectory.reward is None:
        return "unknown"
    return "right" if trajectory.parts.get("verdict", 0.0) >= 1 else "wrong"


def _messages(trajectory: Trajectory, text_of: Callable[[list[int]], str]) -> list[dict[str, str]]:
    """Stretches of one origin; what older versions drew is shown apart from what newer ones did."""
    return [
        {
            "role": "assistant" if segment.is_sampled else "user",
            "name": f"version {segment.weight_version}" if segment.is_sampled else "",
            "content": text_of(list(segment.token_ids)),
        }
        for segment in trajectory.segments
    ]


def write_report(
    folder: Path, rows: Sequence[Row], answers: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Both, whole or as they were.

    Args:
        folder: of the run's ledger.
        rows: its history.
        answers: of ``page_rows``, of the iterations to look at.
        title: of both.
    """
    write_atomically(folder / REPORT, draw(rows, title))
    page = trajectories_page(title, answers, curves(rows))
    write_atomically(folder / PAGE, page.encode())
