"""``megatron-k2 selfcheck``: the tests on this machine's devices, and what they measured."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from megatron_k2.selfcheck import Outcome

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


def speeds(*, on_gpu: bool) -> str:
    """What the device reaches, to judge plans by: a square GEMM, and a copy."""
    import time

    import torch

    device, dtype, size = ("cuda", torch.bfloat16, 8192) if on_gpu else ("cpu", torch.float32, 1024)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def seconds(run: object, repeats: int = 10) -> float:
        assert callable(run)
        run()
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    flops = 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out))
    copied = 2 * a.numel() * a.element_size() / seconds(lambda: out.copy_(a))
    name = torch.cuda.get_device_name() if on_gpu else "CPU, one thread"
    kind = str(dtype).removeprefix("torch.")
    return f"{name}: {flops / 1e12:.3g} TFLOP/s ({size}³, {kind}), copy {copied / 1e9:.3g} GB/s"


def main(argv: list[str]) -> int:
    """Run the checks; 0 if none failed."""
    parser = argparse.ArgumentParser(
        prog="megatron-k2 selfcheck",
        description="Run the checkout's tests on this machine's GPUs over NCCL, or its CPU over "
        "gloo, and print what they measured. On a cluster: srun --nodes=1 --gpus-per-node=8 "
        "megatron-k2 selfcheck.",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument("--only", metavar="TEXT", help="checks whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="those under half a minute")
    arguments = parser.parse_args(argv)
    import torch

    from megatron_k2.errors import UserError
    from megatron_k2.selfcheck import chosen, run_check
    from megatron_k2.terminal import show

    has_cuda = torch.cuda.is_available()
    on_gpu = arguments.device == "cuda" or (arguments.device is None and has_cuda)
    if on_gpu and not has_cuda:
        raise UserError("--device cuda: torch sees no GPU here; megatron-k2 doctor says why")
    checks = chosen(arguments.only, on_gpu=on_gpu, is_quick=arguments.quick)
    show(f"{speeds(on_gpu=on_gpu)}\n", _row(*COLUMNS))
    outcomes = []
    for check in checks:
        outcomes.append(run_check(check, on_gpu=on_gpu))
        show(*_rows(outcomes[-1]))
    failed = sum(outcome.failed for outcome in outcomes)
    skipped = sum(outcome.verdict == "skip" for outcome in outcomes)
    print(f"\n{len(outcomes)} checks, {failed} tests failed, {skipped} checks did not run")
    return 1 if failed else 0
