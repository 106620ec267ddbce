"""What an optimizer step calls: AdamW over lists, scaling, and FP8 primary weights from shards."""

import math
from typing import Any

import torch
from torch import Tensor

from tests.te.standin.quantization import BLOCK, FP8

Lists = list[list[Tensor]]


def multi_tensor_scale(chunk_size: int, overflow: Tensor, lists: Lists, scale: float) -> None:
    """``destination = source * scale``."""
    for source, destination in zip(*lists, strict=True):
        destination.copy_(source * scale)


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Norm over all tensors, and of each if asked."""
    norms = torch.stack([t.float().norm() for t in lists[0]]) if lists[0] else torch.zeros(1)
    return norms.norm().reshape(1), norms if per_tensor else torch.zeros(0)


def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    is_decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW in place on (gradient, parameter, first and second moment)."""
    if not is_decoupled:
        raise NotImplementedError("Adam with weight decay in the gradient")
    first_correction = 1 - beta1**step if bias_correction else 1.0
    second_correction = 1 - beta2**step if bias_correction else 1.0
    for gradient, param, first, second in zip(*lists, strict=True):
        g = gradient.float()
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (second / second_correction).sqrt_().add_(eps)
        update = first / first_correction / denominator + weight_decay * param.float()
        param.sub_((lr * update).to(param.dtype))


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    overflow: Tensor,
    lists: Lists,
    largest: float,
    power_of_two: bool,
    eps: float,
) -> None:
    """Scales and their inverses from maxima, as ``quantization.block_codes`` makes them."""
    for amax, scale, scale_inv in zip(*lists, strict=True):
        bounded = amax.clamp_min(eps)
        value = torch.where(bounded == 0, torch.ones_like(amax), largest / bounded)
        value.clamp_(max=torch.finfo(torch.float32).max)
        if power_of_two:
            value = (value.view(torch.int32) & 0x7F800000).view(torch.float32)
        scale.copy_(value)
        scale_inv.copy_(1.0 / value)


def _blocks_of(start: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Block row and column of each of ``count`` elements from ``start`` of a row-major matrix."""
    at = torch.arange(start, start + count)
    return at // width // BLOCK, at % width // BLOCK


def fp8_block_scaling_compute_partial_amax(
    master: Tensor, amax: Tensor, height: int, width: int, start: int, block_len: int
) -> None:
    """The maxima that the shard [start, start + n) contributes to its 128x128 blocks."""
    rows, cols = _blocks_of(start, master.numel(), width)
    flat = rows * amax.shape[1] + cols
    found = torch.zeros(amax.numel()).scatter_reduce_(0, flat, master.float().abs(), "amax")
    amax.copy_(torch.maximum(amax, found.view_as(amax)))


def fp8_block_scaling_partial_cast(
    master: Tensor,
    codes: Tensor,
    scale: Tensor,
    height: int,
    width: int,
    start: int,
    block_len: int,
    dtype: Any,
) -> None:
    """The shard's codes by its blocks' scales."""
    kind, largest = FP8[int(dtype)]
    rows, cols = _blocks_of(start, master.numel(), width)
    scaled = (master.float() * scale[rows, cols]).clamp_(-largest, largest)
    codes.copy_(scaled.to(kind).view(torch.uint8))


def fp8_transpose(codes: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """Codes of the transposed matrix."""
    rows = math.prod(codes.shape[:-1])
    transposed = codes.reshape(rows, codes.shape[-1]).t().contiguous()
    return transposed if out is None else out.copy_(transposed.view_as(out))


KERNELS = {
    "multi_tensor_scale": multi_tensor_scale,
    "multi_tensor_scale_tensor": multi_tensor_scale,
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_adam": multi_tensor_adam,
    "multi_tensor_compute_scale_and_scale_inv": multi_tensor_compute_scale_and_scale_inv,
    "fp8_block_scaling_compute_partial_amax": fp8_block_scaling_compute_partial_amax,
    "fp8_block_scaling_partial_cast": fp8_block_scaling_partial_cast,
    "fp8_transpose": fp8_transpose,
}
