"""Step: the local model on the device against the CPU, forward, gradients and maximum logits.

fp32 by the largest difference relative to a tensor's largest magnitude: sums run in another order,
and a GPU's elementary functions differ in the last digits (TF32 is off, torch's default). bf16 has
no such bound that means anything: the device's distance from the fp32 result must be no more than
twice the distance of the CPU's own bf16, in the median.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_k2.presets import K2_TINY
from megatron_k2.selfcheck.findings import Figure, Findings, judged
from megatron_k2.selfcheck.one_rank import build, one_rank, randomise
from megatron_k2.selfcheck.two_sides import both_sides

SEQUENCE = {"full": 512, "small": 128}
FP32_BAR, GRADIENT_BAR, BF16_RATIO = 1e-5, 1e-4, 2.0
BRANCH = 0.1
FLAGS = "--muonclip --moe-aux-loss-coeff 0".split()


def side(workload: str) -> dict[str, Any]:
    """Logits, loss, gradients and maximum logits of ``k2-tiny`` under YaRN, in fp32 and bf16."""
    with one_rank():
        return {
            dtype: _computed(SEQUENCE[workload], ["--bf16"] if dtype == "bf16" else [])
            for dtype in ("fp32", "bf16")
        }


def _computed(length: int, flags: list[str]) -> dict[str, Any]:
    sizes = ["--seq-length", str(length), "--max-position-embeddings", str(length)]
    model = build(K2_TINY, *FLAGS, *sizes, *flags, yarn=True).train()
    randomise(model)
    _calm(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(K2_TINY.vocab_size, (1, length + 1), generator=generator).to(device)
    positions = torch.arange(length, device=device)[None]
    with torch.no_grad():
        logits = model.eval()(ids[:, :-1], positions, None)
    loss = model.train()(ids[:, :-1], positions, None, labels=ids[:, 1:]).float().mean()
    loss.backward()
    named = list(model.named_modules())
    maxima = [m.current_max_attn_logits for _, m in named if hasattr(m, "current_max_attn_logits")]
    return {
        "loss": loss.detach().cpu(),
        "logits": logits.detach().float().cpu(),
        "maximum logits": torch.stack(maxima).float().cpu(),
        "gradients": {n: p.grad.float().cpu() for n, p in model.named_parameters()},
    }


def _calm(model: torch.nn.Module) -> None:
    """Make what a block adds small, so that a rounding seldom changes a later layer's experts."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                param.mul_(BRANCH)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest |difference| over the largest |expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def typical_distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Median of ‖difference‖ / ‖expected‖ over the logits of each token and every gradient.

    The median, since a token whose experts change with the rounding has another result altogether.
    """
    rows = [(found["logits"].flatten(0, -2), expected["logits"].flatten(0, -2))]
    rows += [
        (found["gradients"][n].flatten()[None], g.flatten()[None])
        for n, g in expected["gradients"].items()
    ]
    distances = [(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in rows]
    return float(torch.cat(distances).nanmedian())


def measure(device: str, workload: str) -> Findings:
    """Both sides, compared."""
    found, expected = both_sides(__name__, device, workload)
    ours, theirs = found["fp32"], expected["fp32"]
    gradients = {
        name: relative_difference(ours["gradients"][name], gradient)
        for name, gradient in theirs["gradients"].items()
        if float(gradient.abs().max()) > 0
    }
    worst = max(gradients, key=lambda name: gradients[name])
    own = typical_distance(expected["bf16"], theirs)
    figures = [
        Figure(f"fp32 {key}", relative_difference(ours[key], theirs[key]), bar=FP32_BAR)
        for key in ("loss", "logits", "maximum logits")
    ]
    figures += [
        Figure("fp32 gradients", gradients[worst], bar=GRADIENT_BAR),
        Figure(
            "bf16, typical token or gradient",
            typical_distance(found["bf16"], theirs),
            bar=BF16_RATIO * own,
            beside=own,
            beside_what="the CPU's own bf16",
        ),
    ]
    note = f"{len(gradients)} gradients; the furthest is {worst}"
    return judged(note, figures)
