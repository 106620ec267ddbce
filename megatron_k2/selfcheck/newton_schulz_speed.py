"""Step: Newton-Schulz on Kimi K2's shapes, beside Emerging-Optimizers and torch.optim.Muon.

All run five steps of the same polynomials in bf16. A rate is the FLOPs of the form that ran, with
symmetric products formed whole, over its seconds; the peak is a large product's, in the same
process. On a CPU the shapes are an eighth in each direction.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_k2.optimizer.newton_schulz.coefficients import coefficient_set
from megatron_k2.optimizer.newton_schulz.cost import SymmetricMethod, newton_schulz_flops
from megatron_k2.optimizer.newton_schulz.gram_restarts import restart_segments
from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize
from megatron_k2.selfcheck.clock import product_rate, seconds
from megatron_k2.selfcheck.findings import Figure, Findings, judged
from megatron_k2.selfcheck.triton_kernels import shapes

STEPS = 5
SCALE = {"cuda": 1, "cpu": 8}
LARGEST_SINGULAR_VALUE = 1.3
"""What Jordan's five steps leave at most of a singular value, 1.2, and bf16's rounding."""
POWER_STEPS = 20


def _peers(G: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Other implementations that are installed, which take one matrix or a batch."""
    found: dict[str, Callable[[], Tensor]] = {}
    if G.ndim == 2:
        from torch.optim._muon import _zeropower_via_newtonschulz

        simple = (3.4445, -4.775, 2.0315)
        found["torch.optim.Muon"] = lambda: _zeropower_via_newtonschulz(G, simple, STEPS, 1e-7)
    try:
        from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
    except ImportError:
        return found
    # Its switch to bf16 is torch's own precision of fp32 products; this process has no others.
    torch.set_float32_matmul_precision("medium")
    found["Emerging-Optimizers"] = partial(newton_schulz, G, STEPS, "simple")
    return found


def largest_singular_value(X: Tensor) -> float:
    """Of the matrices of ``X``, by a power iteration from below: SVDs of them take minutes."""
    vector = torch.randn(*X.shape[:-2], X.shape[-1], 1, device=X.device)
    norm = vector.norm(dim=-2, keepdim=True)
    for _ in range(POWER_STEPS):
        vector = X.mT @ (X @ (vector / norm))
        norm = vector.norm(dim=-2, keepdim=True)
    return float(norm.max().sqrt())


def _one_shape(name: str, G: Tensor, peak: float) -> tuple[list[Figure], float]:
    """Figures of matrices of one shape, and the best FLOP/s of ours."""
    device, dtype = G.device.type, torch.bfloat16
    segments = restart_segments(coefficient_set("jordan").take(STEPS), dtype)
    count, (rows, cols) = G.shape[0] if G.ndim > 2 else 1, G.shape[-2:]
    flops = count * newton_schulz_flops(rows, cols, segments, "auto", "none", dtype)
    methods: tuple[SymmetricMethod, ...] = ("none", "triton") if device == "cuda" else ("none",)
    calls = {m: partial(orthogonalize, G, dtype=dtype, symmetric=m) for m in methods}
    largest = max(largest_singular_value(call().float()) for call in calls.values())
    figures = [Figure(f"largest singular value, {name}", largest, bar=LARGEST_SINGULAR_VALUE)]
    times = {method: seconds(call, device) for method, call in calls.items()}
    for method, taken in times.items():
        label = "ours" if method == "none" else "ours, one triangle"
        part = flops / taken / peak
        figures.append(Figure(f"{label}, {name}", 1e3 * taken, "ms", None, part, "of the peak"))
    best = min(times.values())
    for peer, call in _peers(G).items():
        taken = seconds(call, device)
        said = "x our time"
        figures.append(Figure(f"{peer}, {name}", 1e3 * taken, "ms", None, taken / best, said))
    return figures, flops / best


def measure(device: str, workload: str) -> Findings:
    """Every shape; of one that comes alone and in a batch, the batch is what the planner needs."""
    peak = product_rate(device, torch.bfloat16)
    figures: list[Figure] = []
    rates: dict[str, float] = {}
    for what, count, n, m in shapes() if workload == "full" else shapes()[1:2]:
        rows, cols = n // SCALE[device], m // SCALE[device]
        G = torch.randn(count, rows, cols, device=device)
        found, rate = _one_shape(f"{what} ({rows} x {cols})", G if count > 1 else G[0], peak)
        figures += found
        rates.setdefault(f"{rows}x{cols}", rate)
    note = f"peak {peak / 1e12:.3g} TFLOP/s in bf16, {STEPS} steps of Jordan's polynomial"
    return judged(note, figures, {"newton_schulz_flops": rates})
