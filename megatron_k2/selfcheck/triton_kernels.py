"""Step: the Triton kernels on the device: right first, then timed over Kimi K2's shapes.

Symmetric products against torch's, by the rounding of one product; FP8 tiles byte for byte against
the same tiles in plain torch. Timed against torch's own product and against the memory's rate.
"""

import importlib.util
from functools import partial

import torch
from torch import Tensor

from megatron_k2.fp8 import tiles
from megatron_k2.optimizer.newton_schulz.symmetric import product
from megatron_k2.presets import KIMI_K2
from megatron_k2.selfcheck.clock import copy_rate, product_rate, seconds
from megatron_k2.selfcheck.findings import Figure, Findings, judged

PRODUCT_BAR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""‖difference‖ / ‖product‖ to the fp64 product; bf16's rounding of the result alone is 1.7e-3."""
EXPERTS_AT_ONCE = 8
TILE_ROWS = 16384


def shapes() -> list[tuple[str, int, int, int]]:
    """(what, matrices, n, m) of the products ``X Xᵀ`` in a step over Kimi K2."""
    p = KIMI_K2
    hidden, heads = p.hidden_size, p.num_attention_heads
    query = heads * (p.qk_head_dim + p.qk_pos_emb_head_dim)
    key_value = heads * (p.qk_head_dim + p.v_head_dim)
    assert p.q_lora_rank is not None
    return [
        (f"{EXPERTS_AT_ONCE} experts", EXPERTS_AT_ONCE, p.moe_ffn_hidden_size, hidden),
        ("one expert", 1, p.moe_ffn_hidden_size, hidden),
        ("output projection", 1, hidden, heads * p.v_head_dim),
        ("query down", 1, p.q_lora_rank, hidden),
        ("query up", 1, p.q_lora_rank, query),
        ("key-value down", 1, p.kv_lora_rank + p.qk_pos_emb_head_dim, hidden),
        ("key-value up", 1, p.kv_lora_rank, key_value),
    ]


def measure(device: str, workload: str) -> Findings:
    """Both kernels."""
    del workload
    if device == "cpu":
        rates = {
            "matmul_fp32_flops": product_rate(device, torch.float32),
            "matmul_bf16_flops": product_rate(device, torch.bfloat16),
            "copy_bytes_per_s": copy_rate(device),
        }
        figures = [_rate_figure(name, rate) for name, rate in rates.items()]
        note = "this CPU's ceilings; Triton compiles for GPUs (its interpreter is in the tests)"
        return Findings("pass", note, tuple(figures), rates)
    if importlib.util.find_spec("triton") is None:
        return Findings("skip", "triton is not installed; it comes with torch's CUDA builds")
    peak, copied = product_rate(device, torch.bfloat16), copy_rate(device)
    rates = {
        "matmul_bf16_flops": peak,
        "matmul_fp32_flops": product_rate(device, torch.float32),
        "copy_bytes_per_s": copied,
    }
    figures = [_rate_figure(name, rate) for name, rate in rates.items()]
    figures += _right_products() + _symmetric_speeds() + _fp8_tiles(copied)
    return judged("speeds beside torch's own product and beside a copy", figures, rates)


def _rate_figure(name: str, rate: float) -> Figure:
    is_copy = name == "copy_bytes_per_s"
    return Figure(
        name.rsplit("_", 1)[0].replace("_", " ") if not is_copy else "copy within memory",
        rate / (1e9 if is_copy else 1e12),
        "GB/s" if is_copy else "TFLOP/s",
    )


def _right_products() -> list[Figure]:
    worst = dict.fromkeys(PRODUCT_BAR, 0.0)
    for dtype in worst:
        for shape in ((520, 1000), (3, 384, 512), (2, 257, 70)):
            X = torch.randn(*shape, device="cuda").to(dtype)
            R = product(X, X.mT, symmetric="triton")
            mixed = product(R, R, add=R, beta=-4.775, alpha=2.0315, symmetric="triton")
            exact, whole = X.double() @ X.double().mT, R.double()
            worst[dtype] = max(
                worst[dtype],
                _distance(R, exact),
                _distance(mixed, 2.0315 * whole @ whole - 4.775 * whole),
            )
    return [
        Figure(f"symmetric product, {str(dtype).split('.')[1]}", worst[dtype], bar=bar)
        for dtype, bar in PRODUCT_BAR.items()
    ]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def _symmetric_speeds() -> list[Figure]:
    """How many times as fast as torch's product the kernel is: X Xᵀ, and bR + cR²."""
    figures = []
    for what, count, n, m in shapes():
        X = torch.randn(count, n, m, device="cuda").to(torch.bfloat16) / m**0.5
        X = X if count > 1 else X[0]
        R = X @ X.mT
        gram, square = partial(product, X, X.mT), partial(product, R, R, add=R, beta=0.5, alpha=0.2)
        times = {
            (method, kind): seconds(partial(call, symmetric=method), "cuda")
            for method in ("none", "triton")
            for kind, call in (("gram", gram), ("square", square))
        }
        figures += [
            Figure(
                f"symmetric {kind}, {what} ({n} x {m})",
                times["none", kind] / times["triton", kind],
                "x torch's",
            )
            for kind in ("gram", "square")
        ]
    return figures


def _fp8_tiles(copied: float) -> list[Figure]:
    if torch.cuda.get_device_capability() < (8, 9):
        return []
    from megatron_k2.fp8 import triton_tiles

    x = torch.randn(TILE_ROWS, KIMI_K2.hidden_size, device="cuda").to(torch.bfloat16)
    codes, scales = triton_tiles.quantize_tiles(x)
    expected_codes, expected_scales = tiles.quantize_tiles(x)
    back = triton_tiles.dequantize_tiles(codes, scales, x.dtype)
    wrong = (codes.view(torch.uint8) != expected_codes.view(torch.uint8)).sum()
    wrong = wrong + (scales != expected_scales).sum()
    wrong = wrong + (back != tiles.dequantize_tiles(codes, scales, x.dtype)).sum()
    moved = x.numel() * 3 + scales.numel() * 4
    quantized = moved / seconds(lambda: triton_tiles.quantize_tiles(x), "cuda")
    restored = moved / seconds(
        lambda: triton_tiles.dequantize_tiles(codes, scales, x.dtype), "cuda"
    )
    return [
        Figure("FP8 tiles, bytes that differ from plain torch's", float(wrong), bar=0),
        Figure("FP8 tiles, quantise", quantized / 1e9, "GB/s", None, copied / 1e9, "a copy"),
        Figure("FP8 tiles, restore", restored / 1e9, "GB/s", None, copied / 1e9, "a copy"),
    ]
