"""E4M3 in tiles of 1x128 with fp32 scales: the format activations are kept in for backward.

For a matrix [m, k] and each row's tiles of 128 columns (the last may be shorter)

    scale = max(amax, AMAX_FLOOR) / 448        code = e4m3(x * (448 / max(amax, AMAX_FLOOR)))

and ``x ≈ code * scale``: a relative error of at most 2⁻⁴ for what is at least 2⁻¹⁴ of the tile's
largest magnitude. The largest code is 448, so no saturation is needed. One reciprocal a tile and
exact fp32 products everywhere else: eager torch, torch.compile and the Triton kernel give the same
bytes. A tile with a number that is not finite becomes NaN as a whole, so that nothing is hidden.

Memory: 1 byte an element and 4 a tile, 1.03125 bytes where bf16 has 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
AMAX_FLOOR = E4M3_MAX * 2.0**-126
"""Keeps both the scale and its reciprocal normal numbers; a tile of zeros needs no special case."""


def num_tiles(width: int) -> int:
    """Tiles of 128 elements that a row of ``width`` has, the last one short."""
    return -(-width // TILE)


def stored_bytes(rows: int, width: int) -> int:
    """Bytes of codes and scales of a matrix."""
    return rows * (width + 4 * num_tiles(width))


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x``.

    Args:
        x: [m, k] fp32, bf16 or fp16.

    Returns:
        Codes [m, k] e4m3 and scales [m, ceil(k / 128)] fp32.
    """
    m, k = x.shape
    padded = F.pad(x, (0, -k % TILE)) if k % TILE else x
    tiles = padded.reshape(m, num_tiles(k), TILE).float()
    amax = tiles.abs().amax(-1).clamp_min(AMAX_FLOOR)
    # Tensor by tensor: with a Python number torch multiplies by a rounded reciprocal instead.
    largest = torch.full_like(amax, E4M3_MAX)
    codes = (tiles * (largest / amax).unsqueeze(-1)).to(E4M3).view(m, padded.shape[1])
    if k % TILE:  # a copy, whatever the shape, so that the padding is not kept
        codes = codes[:, :k].clone(memory_format=torch.contiguous_format)
    return codes, amax / largest


def dequantize_tiles(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * scale`` in fp32, rounded once to ``dtype``.

    Args:
        codes: [m, k] e4m3.
        scales: [m, ceil(k / 128)] fp32.
        dtype: of the result.

    Returns:
        [m, k].
    """
    m, k = codes.shape
    if tuple(scales.shape) != (m, num_tiles(k)):
        raise ValueError(f"scales {list(scales.shape)}, expected {[m, num_tiles(k)]}")
    if k % TILE:
        per_column = scales.repeat_interleave(TILE, dim=1)[:, :k]
        return (codes.float() * per_column).to(dtype)
    tiles = codes.view(m, num_tiles(k), TILE).float() * scales.unsqueeze(-1)
    return tiles.view(m, k).to(dtype)
