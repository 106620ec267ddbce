"""Forms of Newton-Schulz on one matrix or a batch, against torch.optim.Muon and the GEMM peak.

The ceiling of a form is its executed FLOPs at the rate of a square GEMM of the same dtype, measured
in the same rounds. Times are CPU seconds per call, so other work on the machine matters less.

    python benchmarks/newton_schulz.py --shape 512 1792 --dtype float32
"""

import argparse
from collections.abc import Callable

import torch
from harness import machine_lock, paired_medians, print_inputs, print_result
from torch import Tensor

from megatron_k2.optimizer.newton_schulz import newton_schulz_flops, orthogonalize
from megatron_k2.optimizer.symmetric import SymmetricMethod

STEPS = 5
GEMM_SIZE = 768
FORMS: tuple[tuple[str, str, SymmetricMethod, int], ...] = (
    ("plain", "plain", "none", 2),
    ("plain_blocks", "plain", "blocks", 2),
    ("gram_restart2", "gram", "none", 2),
    ("gram_restart3", "gram", "none", 3),
    ("gram_restart5", "gram", "none", 5),
    ("gram_restart2_blocks", "gram", "blocks", 2),
    ("gram_restart5_blocks", "gram", "blocks", 5),
)


def torch_optim_muon(G: Tensor) -> Callable[[], object]:
    """torch.optim.Muon's step on ``G``: bf16 plain form, momentum and weight update."""
    weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in G]
    for weight, gradient in zip(weights, G, strict=True):
        weight.grad = gradient
    return torch.optim.Muon(weights, lr=0.0).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(512, 1792), help="rows cols")
    parser.add_argument("--batch", type=int, default=1, help="matrices per call")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    rows, cols = arguments.shape
    generator = torch.Generator().manual_seed(arguments.seed)
    G = torch.randn(arguments.batch, rows, cols, generator=generator)
    square = torch.randn(GEMM_SIZE, GEMM_SIZE, generator=generator).to(dtype)

    candidates: dict[str, Callable[[], object]] = {"gemm": lambda: square @ square}
    if dtype == torch.bfloat16:
        candidates["torch_optim_muon"] = torch_optim_muon(G)
    for name, form, symmetric, restart_every in FORMS:
        candidates[name] = lambda f=form, s=symmetric, r=restart_every: orthogonalize(
            G, form=f, symmetric=s, restart_every=r, dtype=dtype
        )
    with machine_lock():
        print_inputs(**vars(arguments))
        timings = paired_medians(candidates, arguments.rounds, arguments.seed)
    peak = 2 * GEMM_SIZE**3 / timings["gemm"].cpu_seconds
    print(f"ceiling: {peak / 1e9:.0f} GFLOP/s, a {GEMM_SIZE}³ GEMM in {arguments.dtype}")
    report(G, dtype, peak, {name: t.cpu_seconds for name, t in timings.items()})


def report(G: Tensor, dtype: torch.dtype, peak: float, seconds: dict[str, float]) -> None:
    batch, rows, cols = G.shape
    exact = orthogonalize(G.double(), form="plain")
    print("| form | GFLOP | CPU ms | floor ms | of floor | speed-up | error to fp64 |")
    print("|---|---|---|---|---|---|---|")
    if "torch_optim_muon" in seconds:
        ms = seconds["torch_optim_muon"] * 1e3
        print(f"| torch_optim_muon | | {ms:.1f} | | | {seconds['plain'] * 1e3 / ms:.2f} | |")
    for name, form, symmetric, restart_every in FORMS:
        flops = batch * newton_schulz_flops(rows, cols, STEPS, form, symmetric, restart_every)
        result = orthogonalize(
            G, form=form, symmetric=symmetric, restart_every=restart_every, dtype=dtype
        )
        error = ((result.double() - exact).norm() / exact.norm()).item()
        floor = flops / peak
        print(
            f"| {name} | {flops / 1e9:.2f} | {seconds[name] * 1e3:.1f} | {floor * 1e3:.1f} "
            f"| {seconds[name] / floor:.2f} | {seconds['plain'] / seconds[name]:.2f} "
            f"| {error:.1e} |"
        )
    best = min((name for name, *_ in FORMS), key=lambda name: seconds[name])
    print_result(
        plain_ms=seconds["plain"] * 1e3,
        gram_ms=seconds["gram_restart2"] * 1e3,
        best=best,
        best_ms=seconds[best] * 1e3,
        speedup=seconds["plain"] / seconds[best],
        peak_gflops=peak / 1e9,
    )


if __name__ == "__main__":
    main()
