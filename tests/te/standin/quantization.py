"""FP8 block scaling as TE's kernels define it: 1x128 tiles or 128x128 blocks, E4M3 or E5M2.

``scale = max / amax``, rounded down to a power of two where the quantiser asks for it;
``code = saturate(x * scale)``, and ``scale_inv = 1 / scale`` is kept. Only
``Float8BlockQuantizer``: the other recipes' quantisers raise, so a test cannot pass by having
computed nothing.
"""

from typing import Any

import torch
from torch import Tensor

from tests.te.standin.kernels import high_precision

BLOCK = 128
FP8 = {7: (torch.float8_e4m3fn, 448.0), 8: (torch.float8_e5m2, 57344.0)}
"""TE's dtype -> torch's, and its largest finite number."""


def block_codes(
    x: Tensor, dtype: torch.dtype, largest: float, dim: int, eps: float, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Codes as uint8 [m, k] and ``scale_inv`` fp32 of a matrix.

    Args:
        x: [m, k].
        dtype: of the codes.
        largest: the largest finite number of ``dtype``.
        dim: 1 for tiles of 1x128, scales [m, ceil(k / 128)]; 2 for blocks, [ceil(m / 128), ...].
        eps: lower bound of amax.
        power_of_two: round the scale down to one.
    """
    m, k = x.shape
    height = BLOCK if dim == 2 else 1
    padded = torch.nn.functional.pad(x.float(), (0, -k % BLOCK, 0, -m % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax((1, 3)).clamp_min(eps)
    scale = torch.where(amax == 0, torch.ones_like(amax), largest / amax)
    scale = scale.clamp_max(torch.finfo(torch.float32).max)
    if power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    codes = (blocks * scale[:, None, :, None]).clamp(-largest, largest).to(dtype)
    return codes.view(padded.shape)[:m, :k].contiguous().view(torch.uint8), 1.0 / scale


def quantize(tensor: Any, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Row-wise and column-wise codes and scales, as ``quantizer`` wants them."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    if not isinstance(quantizer, Float8BlockQuantizer):
        raise NotImplementedError(f"quantize for {type(quantizer).__name__} has no CPU stand-in")
    x = high_precision(tensor).detach()
    fields = _quantized_fields(x, quantizer)
    if output is not None:
        for name, value in fields.items():
            current = getattr(output, f"_{name}")
            if value is not None and current is not None:
                current.copy_(value)
        return output
    return _wrapped(x, tensor.dtype, quantizer, fields)


def _quantized_fields(x: Tensor, quantizer: Any) -> dict[str, Tensor | None]:
    shape, matrix = tuple(x.shape), x.reshape(-1, x.shape[-1])
    dtype, largest = FP8[int(quantizer.dtype)]
    fields: dict[str, Tensor | None] = {}
    for side in ("rowwise", "columnwise"):
        is_column = side == "columnwise"
        fields[f"{side}_data"] = fields[f"{side}_scale_inv"] = None
        if not getattr(quantizer, f"{side}_usage"):
            continue
        codes, scale_inv = block_codes(
            matrix.t().contiguous() if is_column else matrix,
            dtype,
            largest,
            quantizer.block_scaling_dim,
            quantizer.amax_epsilon,
            quantizer.force_pow_2_scales,
        )
        if quantizer.block_scaling_dim == 1:  # the GEMM's layout: [ceil(k / 128), m up to 4]
            scale_inv = scale_inv.t()
        room = torch.zeros(quantizer.get_scale_shape(shape, columnwise=is_column))
        room[: scale_inv.shape[0], : scale_inv.shape[1]] = scale_inv
        data_shape = quantizer.get_columnwise_shape(shape) if is_column else shape
        fields[f"{side}_data"], fields[f"{side}_scale_inv"] = codes.reshape(data_shape), room
    return fields


def _wrapped(x: Tensor, dtype: torch.dtype, quantizer: Any, fields: dict[str, Any]) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (
        Float8BlockwiseQTensor,
        Float8BlockwiseQTensorStorage,
    )

    fields |= {
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": quantizer.block_scaling_dim == 2,
        "fake_dtype": dtype,
    }
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(**fields)
    return Float8BlockwiseQTensor(
        shape=x.shape, dtype=dtype, requires_grad=False, device=torch.device("cpu"), **fields
    )


def split_quantize(
    tensor: Tensor,
    splits: list[int],
    quantizers: list[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Each expert's rows by its own quantiser."""
    parts = torch.split(tensor, list(splits))
    return [quantize(part, q) for part, q in zip(parts, quantizers, strict=True)]


KERNELS = {"quantize": quantize, "split_quantize": split_quantize}
