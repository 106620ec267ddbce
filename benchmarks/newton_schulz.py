"""Newton-Schulz of one matrix: ours, torch.optim.Muon's, Emerging-Optimizers', the GEMM peak.

All run five steps of the same polynomials. The floor of a form is its executed FLOPs at the rate of
a square GEMM of the same dtype, measured in the same rounds. Compared are CPU seconds a call, so
that other work on the machine matters less; with two threads they include waiting at barriers, and
wall seconds are printed beside them. Accuracy is measured on four spectra at the same shape.

    python benchmarks/newton_schulz.py                    # bf16: an expert's and q_up's shapes, / 2
    python benchmarks/newton_schulz.py --dtype float32
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Timing, machine_lock, paired_medians, print_inputs, print_result
from torch import Tensor

from megatron_k2.optimizer.newton_schulz.coefficients import coefficient_set
from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.optimizer.newton_schulz.gram_restarts import restart_segments
from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize

STEPS = 5
GEMM_SIZE = 768
SPECTRA = ("gaussian", "power 1/i", "power 1/i^2", "condition 1e3")
JORDAN = coefficient_set("jordan").take(STEPS)

NewtonSchulz = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One implementation: what it computes, and the FLOPs of its matrix products."""

    call: NewtonSchulz
    flops: int
    is_peer: bool = False


def ours(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Candidate]:
    """Our forms at this shape; ``gram`` is what ``auto`` takes from cols/rows = 1.5 on."""
    segments = restart_segments(JORDAN, dtype)
    return {
        f"{form} {symmetric}": Candidate(
            lambda G, f=form, s=symmetric: orthogonalize(G, form=f, symmetric=s, dtype=dtype),
            newton_schulz_flops(*shape, segments, form, symmetric, dtype),
        )
        for form in ("plain", "gram")
        for symmetric in ("none", "blocks")
    }


def peers(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Candidate]:
    """What is installed of other implementations; says what is not."""
    flops = newton_schulz_flops(*shape, (STEPS,), "plain")
    found = {}
    if dtype == torch.bfloat16:  # it has no other
        found["torch.optim.Muon"] = Candidate(
            lambda G: torch.optim._muon._zeropower_via_newtonschulz(G, JORDAN[0], STEPS, 1e-7),
            flops,
            is_peer=True,
        )
    try:
        from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
    except ImportError:
        print("absent: Emerging-Optimizers (pip install emerging-optimizers); not compared")
    else:
        # Its switch between fp32 and bf16 is torch's own.
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
        found["Emerging-Optimizers"] = Candidate(
            lambda G: newton_schulz(G, STEPS, "simple"), flops, is_peer=True
        )
    return found


def with_spectrum(shape: tuple[int, int], spectrum: str, generator: torch.Generator) -> Tensor:
    """[rows, cols] fp32 of random singular vectors."""
    X = torch.randn(*shape, generator=generator)
    if spectrum == "gaussian":
        return X
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    i = torch.arange(1, len(S) + 1)
    values = {
        "power 1/i": 1 / i,
        "power 1/i^2": i.float() ** -2,
        "condition 1e3": torch.logspace(0, -3, len(S)),
    }
    return (U * values[spectrum]) @ Vh


def accuracy(G: Tensor, candidates: dict[str, Candidate]) -> dict[str, tuple[float, float]]:
    """(relative error to U Vᵀ, largest singular value) of each."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    exact = U @ Vh
    found = {}
    for name, candidate in candidates.items():
        result = candidate.call(G).float()
        error = (result - exact).norm() / exact.norm()
        found[name] = (error.item(), torch.linalg.matrix_norm(result, 2).item())
    return found


def report_accuracy(
    shape: tuple[int, int], candidates: dict[str, Candidate], generator: torch.Generator
) -> dict[str, float]:
    """Print all; our default's worst error over a peer's, worst excess, largest singular value."""
    ratio, excess, largest = 0.0, -1.0, 0.0
    print("error to U Vᵀ / largest singular value:")
    for spectrum in SPECTRA:
        found = accuracy(with_spectrum(shape, spectrum, generator), candidates)
        cells = "  ".join(f"{name} {e:.4f}/{s:.3f}" for name, (e, s) in found.items())
        print(f"  {spectrum:13s} {cells}")
        for name, (error, value) in found.items():
            if name.startswith("gram"):
                largest = max(largest, value)
                for peer, (theirs, _) in found.items():
                    if candidates[peer].is_peer:
                        ratio, excess = max(ratio, error / theirs), max(excess, error - theirs)
    return {"error_ratio": ratio, "error_excess": excess, "largest_singular": largest}


def report_speed(candidates: dict[str, Candidate], timings: dict[str, Timing]) -> dict[str, float]:
    """Print all; how many times faster our best is than each peer, by CPU and by wall time."""
    peak = 2 * GEMM_SIZE**3 / timings["gemm"].wall_seconds
    print(f"ceiling: {peak / 1e9:.0f} GFLOP/s, a {GEMM_SIZE}³ GEMM")
    print("| Newton-Schulz | GFLOP | CPU ms | wall ms | floor ms | wall/floor |")
    print("|---|---|---|---|---|---|")
    for name, candidate in candidates.items():
        time, floor = timings[name], candidate.flops / peak
        print(
            f"| {name} | {candidate.flops / 1e9:.2f} | {time.cpu_seconds * 1e3:.2f} "
            f"| {time.wall_seconds * 1e3:.2f} | {floor * 1e3:.2f} "
            f"| {time.wall_seconds / floor:.2f} |"
        )
    mine = [n for n, c in candidates.items() if not c.is_peer]
    best = min(mine, key=lambda name: timings[name].cpu_seconds)
    print(f"our fastest: {best}")
    figures = {}
    for name, candidate in candidates.items():
        if candidate.is_peer:
            key = name.replace(".", "_").replace("-", "_").lower()
            figures[f"{key}_cpu"] = timings[name].cpu_seconds / timings[best].cpu_seconds
            figures[f"{key}_wall"] = timings[name].wall_seconds / timings[best].wall_seconds
    return figures


def measure(shape: tuple[int, int], arguments: argparse.Namespace) -> dict[str, float]:
    """One shape: accuracy, then speed with each number of threads."""
    dtype = getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(arguments.seed)
    G = torch.randn(*shape, generator=generator)
    square = torch.randn(GEMM_SIZE, GEMM_SIZE, generator=generator).to(dtype)
    candidates = peers(shape, dtype) | ours(shape, dtype)
    print(f"\n{shape[0]} x {shape[1]}, r = {max(shape) / min(shape):g}, {arguments.dtype}")
    label = f"{shape[0]}x{shape[1]}"
    figures = report_accuracy(shape, candidates, generator)
    figures = {f"{label}_{name}": value for name, value in figures.items()}
    calls: dict[str, Callable[[], object]] = {"gemm": lambda: square @ square}
    calls |= {name: lambda c=candidate: c.call(G) for name, candidate in candidates.items()}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"threads: {threads}")
        found = report_speed(candidates, paired_medians(calls, arguments.rounds, arguments.seed))
        figures |= {f"{label}_{threads}t_{name}": value for name, value in found.items()}
    return figures


def _shape(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        default=[(1024, 3584), (6144, 768)],
        help="rows x cols (default: K2's expert 2048x7168 and q_up 12288x1536, divided by 2)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    with machine_lock():
        print_inputs(**vars(arguments))
        for shape in arguments.shapes:
            figures |= measure(shape, arguments)
    print_result(**figures)


if __name__ == "__main__":
    main()
