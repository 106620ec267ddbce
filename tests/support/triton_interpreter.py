"""Triton 3.8's CPU interpreter, made to round to fp8 and bf16 as GPUs do. Tests only.

Stock, it truncates fp32 -> bf16, and fp32 -> fp8 rounds ties up, loses the carry into an odd
exponent and truncates subnormals. ``tests/fp8/test_triton_tiles.py`` shows it, so that this is
dropped when Triton is right.
"""

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def _as_torch(data: Any, kind: Any) -> torch.Tensor:
    raw = np.ascontiguousarray(data).view(_UNSIGNED[kind.primitive_bitwidth])
    integers = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}[kind.primitive_bitwidth]
    return torch.from_numpy(raw.copy()).view(integers).view(_DTYPES[kind.name])


def round_as_torch_does() -> None:
    """Replace the interpreter's float conversions by torch's, saturating in e4m3."""
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source.name not in _DTYPES or target.name not in _DTYPES:
            return original(data, source, target, rounding_mode)
        value = _as_torch(data, source).to(torch.float32)
        if target.name == "fp8e4nv":  # cvt.rn.satfinite; NaN stays NaN
            value = value.clamp(-448, 448)
        bits = _UNSIGNED[target.primitive_bitwidth]
        integers = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}[target.primitive_bitwidth]
        return value.to(_DTYPES[target.name]).view(integers).numpy().view(bits).reshape(data.shape)

    interpreter._convert_float = convert
