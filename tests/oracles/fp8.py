"""E4M3 from its definition, and quantisation of one number after another."""

import bisect

import numpy as np


def e4m3_values() -> list[float]:
    """The finite non-negative numbers, by code: 0 ... 0x7E."""
    found = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        is_subnormal = exponent == 0
        power = -6 if is_subnormal else exponent - 7
        found.append(2.0**power * (mantissa / 8 + (not is_subnormal)))
    return found


VALUES = e4m3_values()


def nearest_code(x: float) -> int:
    """Round to nearest, ties to the even code; NaN is 0x7F (0xFF with a sign)."""
    sign = 0x80 if np.signbit(x) else 0
    if np.isnan(x):
        return 0x7F
    magnitude = abs(float(x))
    above = bisect.bisect_left(VALUES, magnitude)
    if above == 0:
        return sign
    if above == len(VALUES):
        return sign | (len(VALUES) - 1)
    below = above - 1
    low, high = magnitude - VALUES[below], VALUES[above] - magnitude
    is_lower = low < high or (low == high and below % 2 == 0)
    return sign | (below if is_lower else above)


def tile_codes(x: np.ndarray, tile: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [m, k] and scales fp32 [m, ceil(k / tile)] of a finite fp32 matrix."""
    m, k = x.shape
    floor = np.float32(448 * 2.0**-126)
    codes = np.zeros((m, k), np.uint8)
    scales = np.zeros((m, -(-k // tile)), np.float32)
    for i in range(m):
        for t in range(scales.shape[1]):
            part = x[i, t * tile : (t + 1) * tile].astype(np.float32)
            amax = max(np.float32(max(abs(v) for v in part)), floor)
            scales[i, t] = amax / np.float32(448)
            inverse = np.float32(448) / amax
            codes[i, t * tile : (t + 1) * tile] = [nearest_code(v * inverse) for v in part]
    return codes, scales
