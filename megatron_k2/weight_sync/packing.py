"""Tensors of several dtypes in one run of bytes, as they travel at once."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNED = 16
"""Bytes that a tensor begins at a multiple of, so that any dtype can be read where it lies."""


class Place[Key](NamedTuple):
    """Where one tensor lies."""

    key: Key
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.begin + -(-self.num_bytes // _ALIGNED) * _ALIGNED

    def of(self, packed: Tensor) -> Tensor:
        """The tensor, a view of the bytes."""
        flat = packed[self.begin : self.begin + self.num_bytes]
        return flat.view(self.dtype).view(self.shape)


def places_of[Key](
    tensors: Iterable[tuple[Key, torch.dtype, tuple[int, ...]]],
) -> list[Place[Key]]:
    """Where tensors lie, one behind another."""
    places: list[Place[Key]] = []
    for key, dtype, shape in tensors:
        places.append(Place(key, dtype, shape, places[-1].end if places else 0))
    return places


def room_for[Key](places: Sequence[Place[Key]], device: torch.device | str = "cpu") -> Tensor:
    """Bytes for all of them, not filled."""
    return torch.empty(places[-1].end, dtype=torch.uint8, device=device)
