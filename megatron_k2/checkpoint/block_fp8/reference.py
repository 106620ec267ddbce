"""Block FP8 as Kimi K2 and DeepSeek-V3 release it: e4m3 codes, one fp32 scale a 128x128 block.

``w = code x weight_scale_inv`` of its block (the tensor multiplies despite its name). For a weight
[m, n] scales are [ceil(m / 128), ceil(n / 128)]; blocks at the lower and right edge may be smaller.
Quantising takes ``scale = amax / 448`` (448 is e4m3's largest number), so that each block's largest
weight lands on the largest code.

What can be rebuilt of a quantised weight from its dequantised bf16 values alone depends on how its
scales were made (``scales``).

That is why an import keeps the source's scales: ``requantize`` takes the source's scale for every
block whose values are still those the source had, and a fresh one for the rest.

CPU only, and made for streaming: strips of 128 rows keep temporaries in the cache. torch's own
``float8_e4m3fn -> float32`` takes 5 ns an element on a CPU, moving bits by hand 0.3 (measured).
Conversions come here by ``convert``, which has the same in C: there this is what a machine without
a compiler runs, and what the tests hold the C against.
"""

import math

import numpy as np
import torch
from torch import Tensor

from megatron_k2.checkpoint.block_fp8.layout import BLOCK, scale_shape
from megatron_k2.checkpoint.block_fp8.scales import E4M3_MAX

E4M3 = torch.float8_e4m3fn
_BIAS_SHIFT = 2.0**8
"""Between the exponents' biases of fp16, 15, and e4m3, 7."""

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def _columns(per_block: Tensor, n: int) -> Tensor:
    """[nb] -> [n]: each block's number over its columns."""
    return per_block.repeat_interleave(BLOCK)[:n]


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``code x scale`` in fp32, rounded once to ``dtype``.

    Args:
        codes: [m, n] e4m3; a row chunk must start at a multiple of 128 of its weight.
        scales: [ceil(m / 128), ceil(n / 128)] fp32.
        dtype: of the result.
    """
    m, n = codes.shape
    if tuple(scales.shape) != scale_shape((m, n)):
        raise ValueError(f"scales {list(scales.shape)}, expected {list(scale_shape((m, n)))}")
    result = torch.empty(m, n, dtype=dtype)
    bits = torch.empty(min(m, BLOCK), n, dtype=torch.int16)
    for i, top in enumerate(range(0, m, BLOCK)):
        strip = codes[top : top + BLOCK]
        product = _values(strip, bits[: len(strip)]).mul_(_columns(scales[i], n))
        result[top : top + BLOCK] = product
        if dtype is torch.bfloat16 and (is_nan := product.isnan()).any():  # torch drops its sign
            kept = (product.view(torch.int32)[is_nan] >> 16).to(torch.int16) | 0x40
            result[top : top + BLOCK].view(torch.int16)[is_nan] = kept
    return result


def _values(strip: Tensor, bits: Tensor) -> Tensor:
    """Codes of a strip as fp32, exactly; ``bits``, int16 [<= 128, n], is scratch.

    Sign, exponent and mantissa are moved to fp16's places, where the exponent's bias is 15 instead
    of 7. Widening an int8 has filled the sign's place and the one below with the sign: the mask
    clears that below. Subnormal codes become subnormal fp16 numbers, which are widened exactly also
    where the processor takes subnormal fp32 numbers for zero, as the CPU host makes it do.
    """
    bits.copy_(strip.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values = bits.view(torch.float16).float().mul_(_BIAS_SHIFT)
    magnitude = strip.view(torch.uint8) & 0x7F
    if magnitude.amax() == 0x7F:  # NaN, the one code that is not a number in these places
        is_nan = magnitude == 0x7F
        values[is_nan] = torch.tensor(math.nan).copysign(values[is_nan])
    return values


def _block_amax(strip: Tensor) -> Tensor:
    """Largest magnitude of each block of a strip [<= 128, n], [nb] fp32."""
    columns = strip.abs().amax(0).float()
    padded = torch.nn.functional.pad(columns, (0, -len(columns) % BLOCK))
    return padded.view(-1, BLOCK).amax(1)


def _encode(strip: Tensor, scales: Tensor) -> Tensor:
    """Codes of a strip, [<= 128, n]: fp32 division, saturated, rounded to nearest even."""
    scaled = strip.float() / _columns(scales, strip.shape[1])
    # NaN stays NaN through clamp; without it a quotient of 448 (1 + 2^-24) is still 448
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [m, n] e4m3 and scales fp32 of a weight [m, n] (bf16 or fp32), amax / 448 a block.

    A block of zeros gets scale 1: amax / 448 would divide 0 by 0.
    """
    codes, scales, _ = requantize(weight, None)
    return codes, scales


def requantize(
    weight: Tensor, source_scales: Tensor | None, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor, int]:
    """``quantize``, but blocks that still hold a source's values get the source's scale and codes.

    Per block: quantise by the source's scale, dequantise, compare bit for bit; equal means training
    did not touch it.

    Args:
        weight: [m, n] bf16 or fp32, the dtype it was dequantised to.
        source_scales: of the release it came from, or None.
        power_of_two: round a fresh scale up to one (``ue8m0``), so that no code saturates.

    Returns:
        Codes, scales, and how many blocks took the source's scale.
    """
    m, n = weight.shape
    codes = torch.empty(m, n, dtype=E4M3)
    scales = torch.empty(scale_shape((m, n)), dtype=torch.float32)
    num_kept = 0
    for i, top in enumerate(range(0, m, BLOCK)):
        rows = slice(top, top + BLOCK)
        strip = weight[rows]
        is_same = torch.zeros(scales.shape[1], dtype=torch.bool)
        if source_scales is not None:
            codes[rows], is_same = _encode_as(strip, source_scales[i])
            scales[i] = source_scales[i]
            num_kept += int(is_same.sum())
        if not is_same.all():
            amax = _block_amax(strip)
            fresh = torch.where(amax > 0, amax / E4M3_MAX, torch.ones(()))
            fresh = _power_of_two(fresh) if power_of_two else fresh
            scales[i] = torch.where(is_same, scales[i], fresh)
            codes[rows] = _encode(strip, scales[i])
    return codes, scales, num_kept


def _power_of_two(scales: Tensor) -> Tensor:
    """The power of two at or above each, by its bits: a mantissa carries into the exponent."""
    return ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _encode_as(strip: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes by given scales, and for each block whether they give ``strip`` back, [nb] bool."""
    codes = _encode(strip, scales)
    back = dequantize(codes, scales[None], strip.dtype)
    bits, expected = (t.view(_BITS[strip.dtype]).numpy() for t in (back, strip))
    if np.array_equal(bits, expected):  # ten times faster than torch, and than to see where not
        return codes, torch.ones(len(scales), dtype=torch.bool)
    differs = torch.from_numpy((bits != expected).any(0))
    padded = torch.nn.functional.pad(differs, (0, -len(differs) % BLOCK))
    return codes, ~padded.view(-1, BLOCK).any(1)


def largest_codes(codes: Tensor) -> Tensor:
    """Largest code of each block without its sign, [mb, nb] uint8."""
    m, n = codes.shape
    largest = torch.empty(scale_shape((m, n)), dtype=torch.uint8)
    for i, top in enumerate(range(0, m, BLOCK)):
        strip = codes.view(torch.uint8)[top : top + BLOCK]
        columns = (strip & 0x7F).amax(0)  # sign off: bytes now order as their values do
        padded = torch.nn.functional.pad(columns, (0, -n % BLOCK))
        largest[i] = padded.view(-1, BLOCK).amax(1)
    return largest
