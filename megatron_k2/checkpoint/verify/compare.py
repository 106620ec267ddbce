"""Two checkpoints of either kind, tensor by tensor, under Hugging Face names.

FP8 weights are compared by their values (code x scale), Megatron's fused ones by the parts they
hold, and a row chunk at a time, so any size fits in memory. dtypes may differ: values are compared
in fp32, which holds bf16 and FP8 products as imported exactly.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_k2.checkpoint.block_fp8.convert import dequantized
from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX, block_rows, scale_shape
from megatron_k2.checkpoint.hf.reader import HfSource, is_hf_directory
from megatron_k2.checkpoint.hf.rotary_rows import in_pairs
from megatron_k2.checkpoint.hf.writer import row_chunks
from megatron_k2.checkpoint.names.mapping import expand
from megatron_k2.checkpoint.names.selection import Selection
from megatron_k2.checkpoint.run_config import settle_preset
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError
from megatron_k2.run.iterations import find_iteration


class Weights(Protocol):
    """Named weights of a checkpoint of either kind."""

    shapes: dict[str, tuple[int, ...]]
    """Under Hugging Face names, without scales and leftovers."""

    def values(self, name: str, rows: slice) -> Tensor:
        """Rows, dequantised if they are FP8; rows start at a whole block."""


class HfWeights:
    """The weights of a Hugging Face directory."""

    def __init__(self, source: HfSource) -> None:
        self._source = source
        self.shapes = {name: tensor.shape for name, tensor in source.weights.items()}
        for name, tensor in source.weights.items():
            scales = source.stored.get(name + SCALE_SUFFIX)
            if tensor.dtype is Dtype.E4M3 and (
                scales is None
                or len(tensor.shape) != 2
                or scales.shape != scale_shape(tensor.shape)
                or scales.dtype is not Dtype.FP32
            ):
                raise UserError(f"{source.directory}: '{name}' is FP8 without fitting scales")

    def values(self, name: str, rows: slice) -> Tensor:
        """See ``Weights``; FP8 as bf16, the dtype an import gives it."""
        stored = self._source.read(name, rows)
        if stored.dtype is not Dtype.E4M3:
            return stored.tensor()
        scales = self._source.read(name + SCALE_SUFFIX, block_rows(rows.start, rows.stop))
        return dequantized(stored, scales, Dtype.BF16)[0].tensor()


class MegatronWeights:
    """The weights of a Megatron checkpoint under their released names, through the rules."""

    def __init__(self, source: MegatronSource, preset_name: str | None) -> None:
        self._source = source
        preset = settle_preset(source.args, preset_name, None)
        self._at: dict[str, tuple[str, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        present = source.shapes
        for pair in expand(preset):
            for name, shape, begin in pair.parts():
                if pair.megatron in present:
                    self._at[name], self.shapes[name] = (pair.megatron, begin), shape

    def values(self, name: str, rows: slice) -> Tensor:
        """Rows of a released tensor, read from the Megatron tensor that holds it."""
        megatron, begin = self._at[name]
        return self._source.read(megatron, slice(begin + rows.start, begin + rows.stop)).tensor()


def open_weights(directory: Path, preset_name: str | None = None) -> Weights:
    """A checkpoint of either kind; ``preset_name`` if a Megatron one saved no arguments."""
    if is_hf_directory(directory):
        source = HfSource(directory)
        if (source.directory / "config.json").exists():
            in_pairs(source)
        return HfWeights(source)
    return MegatronWeights(MegatronSource(find_iteration(directory)), preset_name)


@dataclass(frozen=True)
class Difference:
    """How far one tensor of A is from B's."""

    name: str
    is_equal: bool
    max_abs: float
    relative: float
    """Norm of the difference over the norm of B's."""


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ, tensor by tensor."""

    differences: tuple[Difference, ...]
    """Of every tensor both have, largest relative first."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]

    @property
    def num_equal(self) -> int:
        """Tensors with equal values, element for element."""
        return sum(difference.is_equal for difference in self.differences)

    @property
    def is_equal(self) -> bool:
        """Whether both have the same tensors with the same values."""
        is_same = self.num_equal == len(self.differences)
        return is_same and not self.only_in_a and not self.only_in_b


def compare(a: Weights, b: Weights, only: Selection | None = None) -> Comparison:
    """Every tensor of two checkpoints.

    Args:
        a: one.
        b: the other, which relative differences are measured by.
        only: part to compare; tensors outside it are passed over.
    """
    names_a, names_b = (
        {name for name in side.shapes if only is None or only.has_name(name)} for side in (a, b)
    )
    if only is not None:
        only.require_some(names_a | names_b)
    differences = [_difference(name, a, b) for name in sorted(names_a & names_b)]
    differences.sort(key=lambda difference: -difference.relative)
    return Comparison(
        tuple(differences), tuple(sorted(names_a - names_b)), tuple(sorted(names_b - names_a))
    )


def _difference(name: str, a: Weights, b: Weights) -> Difference:
    shape = a.shapes[name]
    if shape != b.shapes[name]:
        raise UserError(f"'{name}' has shape {list(shape)} in A, {list(b.shapes[name])} in B")
    largest = squares = reference = 0.0
    for left, right in _chunks(name, a, b):
        difference = (left - right).abs_()
        difference[(left == right) | (left.isnan() & right.isnan())] = 0.0  # inf - inf is NaN
        largest = max(largest, difference.nan_to_num_(math.inf).max().item())
        squares += difference.square_().sum(dtype=torch.float64).item()
        reference += right.square().sum(dtype=torch.float64).item()
    relative = math.sqrt(squares / reference) if reference else math.inf if squares else 0.0
    return Difference(name, largest == 0.0, largest, relative)


def _chunks(name: str, a: Weights, b: Weights) -> Iterator[tuple[Tensor, Tensor]]:
    for top, end in row_chunks(a.shapes[name], 8):
        rows = slice(top, end)
        yield a.values(name, rows).float(), b.values(name, rows).float()
