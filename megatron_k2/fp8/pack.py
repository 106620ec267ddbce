"""Saved tensors as FP8 codes and scales: the pair of hooks that stores and restores them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_k2.fp8 import native_tiles, tiles


@dataclass(frozen=True)
class StoredTensor:
    """A saved tensor as codes and scales."""

    codes: Tensor
    """[m, k] e4m3."""
    scales: Tensor
    """[m, ceil(k / 128)] fp32."""
    dtype: torch.dtype
    """Of what was saved, and of what backward gets."""


def store(x: Tensor) -> StoredTensor:
    """``x`` [m, k] quantised: by C on a CPU, by the Triton kernel on a GPU that has E4M3."""
    kernels = _kernels(x)
    codes, scales = kernels.quantize_tiles(x.detach())
    return StoredTensor(codes, scales, x.dtype)


def restore(stored: StoredTensor) -> Tensor:
    """The matrix read back, [m, k] in its dtype."""
    kernels = _kernels(stored.codes)
    return kernels.dequantize_tiles(stored.codes, stored.scales, stored.dtype)


def _kernels(x: Tensor) -> Any:
    if x.device.type == "cpu":
        return native_tiles
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9):
        return tiles
    from megatron_k2.fp8 import triton_tiles

    return triton_tiles


class ActivationStorage:
    """The pair of hooks for one forward pass of a layer's experts or MLP.

    Args:
        hidden: its input, [..., hidden].
        gate_up_width: columns of SwiGLU's input on this rank.
        is_input_stored: whether the up-projection's input is taken too.
    """

    def __init__(self, hidden: Tensor, gate_up_width: int, *, is_input_stored: bool) -> None:
        # An identity only while the storage lives: ``hidden`` outlives the forward. Its memory may
        # not: offloading empties it before the down-projection's input is saved, which can then
        # have the same address.
        identity = hidden.untyped_storage()._cdata
        self._input_storage = identity if is_input_stored else None
        self._dtype = hidden.dtype
        self._gate_up_width = gate_up_width

    def pack(self, saved: Tensor) -> Tensor | StoredTensor:
        """What autograd keeps in place of ``saved``."""
        return store(saved) if self._is_kept_in_fp8(saved) else saved

    def unpack(self, kept: Tensor | StoredTensor) -> Tensor:
        """The tensor that the backward pass gets, read back if it was stored in FP8."""
        return restore(kept) if isinstance(kept, StoredTensor) else kept

    def _is_kept_in_fp8(self, saved: Tensor) -> bool:
        # Parameters and Transformer Engine's quantised tensors are classes of their own; the codes
        # and scales it saves have other dtypes and no gradient.
        if type(saved) is not torch.Tensor or saved.dtype != self._dtype or saved.ndim != 2:
            return False
        # An expert without tokens too: its empty view would keep the whole input alive.
        is_input = saved.untyped_storage()._cdata == self._input_storage
        return is_input or (saved.requires_grad and saved.shape[1] == self._gate_up_width)
