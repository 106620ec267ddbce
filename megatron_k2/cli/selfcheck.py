"""``megatron-k2 selfcheck``: this machine measured step by step, and the tests on it."""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from megatron_k2.selfcheck.checkout_tests import Outcome
    from megatron_k2.selfcheck.findings import Figure
    from megatron_k2.selfcheck.steps import StepResult

COLUMNS = {
    "check": 34,
    "": 4,
    "passed": 6,
    "failed": 6,
    "skipped": 7,
    "seconds": 7,
    "difference": 10,
    "bar": 7,
}
"""Heading -> width in characters: rows are printed one by one, as their checks end."""
NAME_WIDTH = 56


def _row(*cells: str) -> "Table":
    from rich.table import Table

    row = Table.grid(padding=(0, 1, 0, 0))
    for number, width in enumerate(COLUMNS.values()):
        row.add_column(width=width, justify="right" if number > 1 else "left")
    row.add_row(*cells)
    return row


def _rows(outcome: "Outcome") -> "list[RenderableType]":
    """A check's row, and a line on why it did not run or failed."""
    differs = f"{outcome.difference:.1e}" if outcome.difference is not None else "-"
    bar = f"{outcome.bar:.0e}" if outcome.bar is not None else "-"
    counts = outcome.passed, outcome.failed, outcome.skipped
    row = _row(
        outcome.check.name,
        outcome.verdict,
        *map(str, counts),
        f"{outcome.seconds:.0f}",
        differs,
        bar,
    )
    return [row, f"    {outcome.note[:110]}"] if outcome.note else [row]


def _figure_line(figure: "Figure") -> str:
    """``name  value unit`` and what it is held against."""
    value = f"{figure.value:.4g} {figure.unit}".strip()
    against = ""
    if figure.bar is not None:
        against = f"at most {figure.bar:.3g}"
    if figure.beside is not None:
        beside = f"{figure.beside:.3g} {figure.beside_what}"
        against = f"{against}; {beside}" if against else beside
    return f"      {figure.name:<{NAME_WIDTH}} {value:<18} {against}".rstrip()


def _step_lines(result: "StepResult") -> list[str]:
    """A step's line with its verdict, its sentence, and its figures."""
    findings = result.findings
    head = f"{findings.verdict:<5} {result.step.name}  ({result.seconds:.0f} s)"
    note = [f"      {findings.note}"] if findings.note else []
    return [head, *note, *map(_figure_line, findings.figures)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-k2 selfcheck",
        description="Measure this machine: the model, MuonClip and the kernels against the CPU, "
        "speeds beside their ceilings and the planner's figures; at most eight minutes. With "
        "--tests the checkout's tests on its GPUs over NCCL, or its CPU over gloo, which takes "
        "longer. On a cluster: srun --nodes=1 --gpus-per-node=8 megatron-k2 selfcheck.",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument("--only", metavar="TEXT", help="steps whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="those under half a minute")
    parser.add_argument("--tests", action="store_true", help="the checkout's tests, row by row")
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        default=Path("selfcheck.json"),
        help="where the steps' figures go, for 'plan --calibrate' and --draw (selfcheck.json)",
    )
    parser.add_argument(
        "--draw",
        metavar="FILE",
        type=Path,
        help="draw such a file, as FILE with .png for its ending, and measure nothing",
    )
    return parser


def _run_tests(arguments: argparse.Namespace, *, on_gpu: bool) -> int:
    from megatron_k2.selfcheck.checkout_tests import chosen, run_check
    from megatron_k2.terminal import show

    checks = chosen(arguments.only, on_gpu=on_gpu, is_quick=arguments.quick)
    show(_row(*COLUMNS))
    outcomes = []
    for check in checks:
        outcome = run_check(check, on_gpu=on_gpu)
        assert outcome is not None  # no limit was given
        outcomes.append(outcome)
        show(*_rows(outcome))
    failed = sum(outcome.failed for outcome in outcomes)
    skipped = sum(outcome.verdict == "skip" for outcome in outcomes)
    print(f"\n{len(outcomes)} checks, {failed} tests failed, {skipped} checks did not run")
    return 1 if failed else 0


def _run_steps(arguments: argparse.Namespace, *, on_gpu: bool) -> int:
    from megatron_k2.selfcheck.machine import device_of, versions
    from megatron_k2.selfcheck.steps import chosen_steps, keep, run_steps

    steps = chosen_steps(arguments.only, is_quick=arguments.quick)
    kind = "cuda" if on_gpu else "cpu"
    device = device_of(kind)
    known = versions() | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    write = keep(arguments.record, device, known)
    print(f"{device.name}, {device.count} of them, {known['date']}")
    said = ", ".join(f"{name} {version}" for name, version in known.items() if version)
    print(f"{said}\n", flush=True)
    results: list[StepResult] = []
    for result in run_steps(steps, kind, "full" if on_gpu else "small"):
        results.append(result)
        print(*_step_lines(result), sep="\n", flush=True)
        write(results)
    verdicts = [result.findings.verdict for result in results]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "FAIL", "skip", "time"))
    print(f"\n{len(results)} steps: {counts}; {arguments.record}")
    return 1 if "FAIL" in verdicts or "time" in verdicts else 0


def main(argv: list[str]) -> int:
    """Run the steps, or the tests; 0 if none failed."""
    arguments = _parser().parse_args(argv)
    from megatron_k2.errors import UserError

    if arguments.draw is not None:
        from megatron_k2.selfcheck.figure import draw_file

        print(draw_file(arguments.draw))
        return 0
    import torch

    has_cuda = torch.cuda.is_available()
    on_gpu = arguments.device == "cuda" or (arguments.device is None and has_cuda)
    if on_gpu and not has_cuda:
        raise UserError("--device cuda: torch sees no GPU here; megatron-k2 doctor says why")
    if arguments.tests:
        return _run_tests(arguments, on_gpu=on_gpu)
    if not arguments.record.absolute().parent.is_dir():
        raise UserError(f"--record {arguments.record}: its directory does not exist; make it")
    return _run_steps(arguments, on_gpu=on_gpu)
