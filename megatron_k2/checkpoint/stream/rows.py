"""Rows of a tensor as numpy holds them: what a conversion moves.

Without torch, whose import takes longer than moving a gigabyte. numpy knows neither bf16 nor e4m3:
their bits are kept as uint16 and uint8, and a ``Dtype`` goes along. ``Rows.tensor`` and ``rows_of``
lead to torch and back where there is arithmetic to do; neither copies.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, override

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_CACHED_ELEMENTS = 1 << 16
"""What is rounded at a time, so that temporaries stay in the cache."""


class Dtype(enum.Enum):
    """How numbers are stored: torch's name, that of safetensors, what numpy holds the bits as."""

    FP32 = ("float32", "F32", "<f4")
    BF16 = ("bfloat16", "BF16", "<u2")
    FP16 = ("float16", "F16", "<f2")
    E4M3 = ("float8_e4m3fn", "F8_E4M3", "u1")
    FP64 = ("float64", "F64", "<f8")
    INT64 = ("int64", "I64", "<i8")
    INT32 = ("int32", "I32", "<i4")
    INT16 = ("int16", "I16", "<i2")
    INT8 = ("int8", "I8", "i1")
    UINT8 = ("uint8", "U8", "u1")
    UINT16 = ("uint16", "U16", "<u2")
    UINT32 = ("uint32", "U32", "<u4")
    E5M2 = ("float8_e5m2", "F8_E5M2", "u1")
    BOOL = ("bool", "BOOL", "?")

    def __init__(self, torch_name: str, safetensors_name: str, numpy: str) -> None:
        self.torch_name = torch_name
        self.safetensors_name = safetensors_name
        self.numpy = np.dtype(numpy)
        self.itemsize = self.numpy.itemsize

    @override
    def __str__(self) -> str:
        return self.torch_name


WEIGHTS = (Dtype.FP32, Dtype.BF16, Dtype.FP16)
"""What a weight may be stored in, e4m3 with its scales aside."""

BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in Dtype}
BY_SAFETENSORS_NAME = {dtype.safetensors_name: dtype for dtype in Dtype}


def promoted(dtypes: Iterable[Dtype]) -> Dtype:
    """Of weights: the one dtype they have, else fp32, which holds every value of the others."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else Dtype.FP32


@dataclass(frozen=True, eq=False)
class Rows:
    """A run of rows of a tensor, [r, ...]; often a view of a mapped file: do not write to it."""

    bits: np.ndarray
    """The values' bits, [r, ...], as an array of ``dtype.numpy``."""
    dtype: Dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[r, ...]: as many rows as there are, then the tensor's other dimensions."""
        return self.bits.shape

    def to(self, dtype: Dtype) -> "Rows":
        """The rows in another dtype of ``WEIGHTS``, to nearest even; itself if it is the same.

        Raises:
            ValueError: if either dtype is not in ``WEIGHTS``.
        """
        if dtype is self.dtype:
            return self
        if dtype not in WEIGHTS or self.dtype not in WEIGHTS:
            raise ValueError(f"{self.dtype} rows cannot become {dtype}")
        if dtype is Dtype.BF16:
            return Rows(_rounded_to_bf16(self._widened()), dtype)
        with np.errstate(over="ignore"):  # fp16: too large a number is an infinity
            return Rows(self._widened().astype(dtype.numpy, copy=False), dtype)

    def _widened(self) -> np.ndarray:
        """The values as fp32, which holds bf16 and fp16 exactly."""
        if self.dtype is Dtype.BF16:
            return (self.bits.astype(np.uint32) << 16).view(np.float32)
        return self.bits.astype(np.float32, copy=False)

    def equals(self, other: "Rows") -> bool:
        """Whether dtype, shape and every bit are the same."""
        return self.dtype is other.dtype and np.array_equal(
            np.ascontiguousarray(self.bits).view(np.uint8),
            np.ascontiguousarray(other.bits).view(np.uint8),
        )

    def first_not_finite(self) -> int | None:
        """The first row with a NaN or an infinity."""
        if self.dtype is Dtype.BF16:
            is_bad = self.bits & 0x7F80 == 0x7F80
        else:
            is_bad = ~np.isfinite(self.bits)
        if not is_bad.any():
            return None
        return int(is_bad.reshape(len(is_bad), -1).any(axis=1).argmax())

    def tensor(self) -> "Tensor":
        """A torch tensor that shares this memory."""
        import torch

        return torch.from_numpy(self.bits).view(getattr(torch, self.dtype.torch_name))


def rows_of(tensor: "Tensor") -> Rows:
    """The rows of a tensor, sharing its memory if it is contiguous."""
    import torch

    dtype = BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
    held_as = getattr(torch, dtype.numpy.name)
    return Rows(tensor.detach().contiguous().view(held_as).numpy(), dtype)


def _rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of bf16, of fp32 values: to nearest, ties to even; NaN stays NaN."""
    flat = np.ascontiguousarray(values).view(np.uint32).reshape(-1)
    result = np.empty(values.shape, np.uint16)
    target = result.reshape(-1)
    for begin in range(0, len(flat), _CACHED_ELEMENTS):
        bits = flat[begin : begin + _CACHED_ELEMENTS]
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        is_nan = np.isnan(bits.view(np.float32))
        if is_nan.any():  # the carry would make an infinity or a zero of some
            rounded[is_nan] = bits[is_nan] >> 16 | 0x40
        target[begin : begin + _CACHED_ELEMENTS] = rounded
    return result
