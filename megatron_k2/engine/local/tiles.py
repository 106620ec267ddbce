"""Arithmetic in which a row's bits do not depend on what is computed beside it.

A library picks its kernel, and with it the order of a sum, by the shape of the whole. Here:

- a product is cut into tiles of a few fixed sizes, filled up with zeros. ``Products`` tries each
  shape when it first meets it: a size that gives other bits than the rest is not used, and a
  machine on which a row's place in its tile matters is refused;
- a sum is a tree of additions, each of them rounded once by IEEE 754, whatever computes it;
- exp, sigmoid and SiLU see whole vectors only: the last few elements of a tensor, and of each
  thread's part of it, go through another implementation, which rounds otherwise.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_k2.errors import UserError

SIZES = (4, 8, 16, 32, 64, 128, 256)
"""Rows of a tile. Products of fewer rows than four go through kernels for vectors."""
BASE = 16
"""The size that the others are compared with."""
_VECTOR = 64
"""Elements: twice the widest vector of bf16, which is what PyTorch's loops take at a time."""
_UNSPLIT = 1 << 15
"""Elements that PyTorch gives to one thread."""

type Product = Callable[[Tensor, Tensor], Tensor]


def total(x: Tensor) -> Tensor:
    """Sum over the last dimension, kept with size 1. Zeros appended to it change nothing."""
    while (width := x.shape[-1]) > 1:
        if width % 2:
            x = F.pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    return x


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of each element."""
    if x.is_cuda:
        return function(x)
    flat = x.reshape(-1)
    padded = F.pad(flat, (0, -len(flat) % _VECTOR))
    if len(padded) <= _UNSPLIT:
        found = function(padded)
    else:
        found = torch.cat([function(part) for part in padded.split(_UNSPLIT)])
    return found[: len(flat)].view(x.shape)


class Products:
    """Matrix products row by row, computed many at a time."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[object, ...], tuple[int, ...]] = {}

    def rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """[n, K] and [N, K] -> [n, N]."""
        return self._tiled(F.linear, 0, x, weight)

    def heads(self, x: Tensor, y: Tensor) -> Tensor:
        """[H, n, K] and [H, K, N] -> [H, n, N]."""
        return self._tiled(torch.bmm, 1, x, y)

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """[P, H, K] and [P, K, N] -> [P, H, N]: bit-equal to ``rows`` of each pair alone."""
        count, num_rows, width = x.shape
        key = ("pairs", num_rows, width, y.shape[2], y.stride()[1:], x.dtype)
        if key not in self._sizes:
            self._sizes[key] = self._sizes_of_pairs(x, y)
        sizes = self._sizes[key]
        if not sizes:
            both = zip(x, y, strict=True)
            return torch.stack([self.rows(one, other.t()) for one, other in both])
        parts, begin = [], 0
        while begin < count:
            size = _fitting(sizes, count - begin)
            part, keys = x[begin : begin + size], y[begin : begin + size]
            parts.append(torch.bmm(_filled(part, 0, size), _filled(keys, 0, size))[: len(part)])
            begin += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tiled(self, product: Product, dim: int, x: Tensor, y: Tensor) -> Tensor:
        key = (product, tuple(y.shape), y.stride(), x.dtype)
        if key not in self._sizes:
            self._sizes[key] = _sizes_of(product, dim, y)
        sizes, x = self._sizes[key], x.contiguous()
        count, begin, parts = x.shape[dim], 0, []
        while begin < count:
            size = _fitting(sizes, count - begin)
            num_own = min(size, count - begin)
            part = _filled(x.narrow(dim, begin, num_own), dim, size)
            parts.append(product(part, y).narrow(dim, 0, num_own))
            begin += size
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _sizes_of_pairs(self, x: Tensor, y: Tensor) -> tuple[int, ...]:
        """Sizes whose pairs have the bits of each alone."""
        largest, generator = SIZES[-1], torch.Generator(x.device).manual_seed(0)
        own = torch.randn((largest, *x.shape[1:]), generator=generator, device=x.device).to(x.dtype)
        keys = _random_like(y, (largest, *y.shape[1:]), generator)
        alone = torch.stack([self.rows(o, k.t()) for o, k in zip(own, keys, strict=True)])
        return tuple(
            size
            for size in SIZES
            if torch.equal(
                torch.cat(list(map(torch.bmm, own.split(size), keys.split(size)))), alone
            )
        )


def _fitting(sizes: tuple[int, ...], count: int) -> int:
    """The smallest size that holds ``count``, or the largest."""
    return next((size for size in sizes if size >= count), sizes[-1])


def _filled(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` with zeros up to ``size`` in one dimension."""
    missing = size - x.shape[dim]
    if not missing:
        return x
    return F.pad(x, (*([0, 0] * (x.dim() - 1 - dim)), 0, missing))


def _random_like(y: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers, the last two dimensions laid out as those of ``y``."""
    is_turned = y.stride(-2) == 1 != y.stride(-1)
    drawn = torch.randn(shape, generator=generator, device=y.device).to(y.dtype)
    return drawn.transpose(-1, -2).contiguous().transpose(-1, -2) if is_turned else drawn


def _sizes_of(product: Product, dim: int, y: Tensor) -> tuple[int, ...]:
    """Sizes of tiles that give each row the bits it has in a tile of ``BASE``.

    Args:
        product: of rows, in dimension ``dim``, with ``y``.
        dim: 0 or 1.
        y: its shape and layout alone matter.

    Raises:
        UserError: a row's bits depend on its place.
    """
    generator = torch.Generator(y.device).manual_seed(0)
    width = y.shape[-1] if product is F.linear else y.shape[-2]
    shape = (*y.shape[:dim], SIZES[-1], width)
    x = torch.randn(shape, generator=generator, device=y.device).to(y.dtype)
    other = _random_like(y, tuple(y.shape), generator)

    def cut(rows: Tensor, size: int) -> Tensor:
        return torch.cat([product(tile, other) for tile in rows.split(size, dim)], dim)

    base = cut(x, BASE)
    if not torch.equal(cut(x.roll(1, dim).contiguous(), BASE), base.roll(1, dim)):
        raise UserError(
            f"products of {BASE} rows with {list(y.shape)} in {y.dtype} give a row other bits at "
            "another place, on this machine: it has no batch-invariant mode; take another dtype"
        )
    return tuple(size for size in SIZES if torch.equal(cut(x, size), base))
