"""Frozen weights in block FP8, as K2 is released: widened where they are used, not kept so.

A weight that does not train is held as e4m3 codes with one fp32 scale a 128 x 128 block, half of
bf16's memory (``checkpoint/block_fp8/reference.py`` describes the format and is its oracle). A
module reads its ``weight`` as before and gets the widened values; what autograd would keep of them
for backward is replaced by the codes, and widened again there. So gradients are to the last bit
those of a model whose weights are the widened values.

The seams are torch's: a parametrization of ``weight``, and ``saved_tensors_hooks`` around the
module's forward. Codes and scales are kept as integers, since a model is cast as a whole to its
compute dtype, and a cast of codes would be silent.
"""

import functools
import weakref
from typing import Any, override

import torch
from torch import Tensor
from torch.nn.utils import parametrize

BLOCK = 128
E4M3_MAX = 448.0


def _blocks(weight: Tensor) -> Tensor:
    """[m, n] -> [mb, 128, nb, 128], zeros beyond the edges."""
    m, n = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -n % BLOCK, 0, -m % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [m, n] e4m3 and scales [⌈m/128⌉, ⌈n/128⌉] fp32, amax / 448 a block; of zeros 1.

    Args:
        weight: [m, n] bf16 or fp32, any device.
    """
    m, n = weight.shape
    blocks = _blocks(weight.float())
    amax = blocks.abs().amax((1, 3))
    scales = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    scaled = (blocks / scales[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    whole = scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(2).flatten(0, 1)
    return whole[:m, :n].contiguous().view(torch.float8_e4m3fn), scales


def dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``code x scale`` in fp32, rounded once to ``dtype``, [m, n]."""
    m, n = codes.shape
    rows = scales.repeat_interleave(BLOCK, 0)[:m]
    return (codes.float() * rows.repeat_interleave(BLOCK, 1)[:, :n]).to(dtype)


class _Widened(torch.nn.Module):
    """The parametrization: codes as uint8 -> weight. Remembers which tensors it has given out."""

    scale_bits: Tensor
    """Of the fp32 scales, int32."""

    def __init__(self, scales: Tensor, dtype: torch.dtype, given: "_Given") -> None:
        super().__init__()
        self.register_buffer("scale_bits", scales.view(torch.int32), persistent=False)
        self._dtype, self._given = dtype, given

    def widen(self, codes: Tensor) -> Tensor:
        """[m, n] in the model's dtype."""
        scales = self.scale_bits.view(torch.float32)
        return dequantize_blocks(codes.view(torch.float8_e4m3fn), scales, self._dtype)

    @override
    def forward(self, codes: Tensor) -> Tensor:
        weight = self.widen(codes)
        self._given.remember(weight, self, codes)
        return weight


class _Given:
    """Widened weights that are alive, by address: what backward shall not keep."""

    def __init__(self) -> None:
        self._alive: dict[int, tuple[weakref.ref[Tensor], _Widened, Tensor]] = {}

    def remember(self, weight: Tensor, by: _Widened, codes: Tensor) -> None:
        at = weight.data_ptr()
        # Gone with the tensor, so that another one at its address is never taken for it.
        ref = weakref.ref(weight, lambda dead: self._forget(at, dead))
        self._alive[at] = (ref, by, codes)

    def _forget(self, at: int, dead: "weakref.ref[Tensor]") -> None:
        if at in self._alive and self._alive[at][0] is dead:
            del self._alive[at]

    def pack(self, kept: Tensor) -> Any:
        """Of a widened weight its source, of all else itself."""
        found = self._alive.get(kept.data_ptr())
        if found is None:
            return kept
        weight = found[0]()
        if weight is None or kept.shape not in (weight.shape, weight.mT.shape):
            return kept
        is_transposed = kept.stride() != weight.stride()
        return found[1], found[2], is_transposed

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        """The tensor again."""
        if isinstance(kept, Tensor):
            return kept
        by, codes, is_transposed = kept
        weight: Tensor = by.widen(codes)
        return weight.mT if is_transposed else weight


def hold_in_fp8(owners: list[tuple[torch.nn.Module, list[torch.nn.Module]]]) -> None:
    """Hold weights in block FP8 from now on.

    Args:
        owners: (module whose forward uses weights, modules whose ``weight`` [m, n] they are); often
            the same one. The weights must not require gradients.

    Raises:
        ValueError: for a weight that trains.
    """
    for owner, holders in owners:
        given = _Given()
        for holder in holders:
            _quantize(holder, given)
        _widen_again(owner, given)


@torch.no_grad()
def _quantize(holder: torch.nn.Module, given: _Given) -> None:
    weight: Any = holder.weight
    if weight.requires_grad:
        raise ValueError(f"{type(holder).__name__}.weight trains, and cannot be held in FP8")
    codes, scales = quantize_blocks(weight)
    dtype = weight.dtype
    holder.weight = torch.nn.Parameter(codes.view(torch.uint8), requires_grad=False)
    widened = _Widened(scales, dtype, given)
    parametrize.register_parametrization(holder, "weight", widened, unsafe=True)


def _widen_again(owner: torch.nn.Module, given: _Given) -> None:
    compute = owner.forward

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(given.pack, given.unpack):
            return compute(*args, **kwargs)

    owner.forward = forward  # type: ignore[method-assign]
