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
    kernels = [False, True] if G.is_cuda and G.ndim == 2 else [False]
    for use_syrk in kernels:
        name = "Emerging-Optimizers" + (" with its syrk" if use_syrk else "")
        found[name] = partial(newton_schulz, G, STEPS, "simple", use_syrk=use_syrk)
    return found


def measure(device: str, workload: str) -> Findings:
    """Every shape."""
    peak = product_rate(device, torch.bfloat16)
    dtype, schedule = torch.bfloat16, coefficient_set("jordan").take(STEPS)
    segments = restart_segments(schedule, dtype)
    figures, rates = [], {}
    methods: tuple[SymmetricMethod, ...] = ("none", "triton") if device == "cuda" else ("none",)
    for what, count, n, m in shapes() if workload == "full" else shapes()[1:2]:
        rows, cols = n // SCALE[device], m // SCALE[device]
        G = torch.randn(count, rows, cols, device=device)
        G = G if count > 1 else G[0]
        flops = count * newton_schulz_flops(rows, cols, segments, "auto", "none", dtype)
        times = {
            method: seconds(partial(orthogonalize, G, dtype=dtype, symmetric=method), device)
            for method in methods
        }
        largest = max(
            float(
                torch.linalg.matrix_norm(
                    orthogonalize(G, dtype=dtype, symmetric=s).float(), 2
                ).max()
            )
            for s in methods
        )
        best = min(times, key=lambda method: times[method])
        if count == 1 or what.endswith("experts"):
            rates[f"{rows}x{cols}"] = flops / times[best]
        name = f"{what} ({rows} x {cols})"
        figures.append(
            Figure(f"largest singular value, {name}", largest, bar=LARGEST_SINGULAR_VALUE)
        )
        for method, taken in times.items():
            label = "ours" if method == "none" else "ours, one triangle"
            figures.append(
                Figure(
                    f"{label}, {name}", 1e3 * taken, "ms", None, flops / taken / peak, "of the peak"
                )
            )
        for peer, call in _peers(G).items():
            taken = seconds(call, device)
            figures.append(
                Figure(
                    f"{peer}, {name}", 1e3 * taken, "ms", None, taken / times[best], "x our time"
                )
            )
    note = f"peak {peak / 1e12:.3g} TFLOP/s in bf16, {STEPS} steps of Jordan's polynomial"
    return judged(note, figures, {"newton_schulz_flops": rates})
