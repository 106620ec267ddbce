"""What travels for one weight: itself and, where an adapter stands beside it, its A and B.

An adapter is merged on the root, from whole matrices in fp32, as a merge of checkpoints does
(``checkpoint/lora``): the same bits. A part of ``B A`` could not be formed where B or A is cut.
What engines hold in block FP8 is quantised there too, from fp32, as an export does
(``checkpoint/block_fp8``); its scales are fresh, also of blocks that no training has touched since
they came from a release, to which an export gives the release's own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_k2.checkpoint.block_fp8.convert import requantized
from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX
from megatron_k2.checkpoint.hf.quantization import BlockFp8
from megatron_k2.checkpoint.lora.adapters import (
    LORA_A,
    LORA_B,
    factors_of,
    linear_of,
    whole_product,
)
from megatron_k2.checkpoint.names.mapping import Pair
from megatron_k2.checkpoint.stream.rows import rows_of
from megatron_k2.errors import UserError
from megatron_k2.weight_sync.pieces import Box


@dataclass(frozen=True)
class Cargo:
    """One weight's."""

    pair: Pair
    names: tuple[str, ...]
    """Of what travels: the weight and, where there is an adapter, A and B."""
    num_elements: int
    """Of all of it."""
    dtype: torch.dtype
    """On the way: fp32 for what is yet to be merged or quantised."""
    kept: torch.dtype
    """Of what is given out and is not quantised."""
    fp8: BlockFp8 | None
    """What is given out in block FP8; None: nothing."""

    @property
    def num_bytes(self) -> int:
        """On the way."""
        return self.num_elements * self.dtype.itemsize

    def given_out(
        self, whole: Mapping[str, Tensor], scale: float | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's names and tensors; in block FP8 codes, and scales by the release's name.

        Args:
            whole: the tensors of ``names``.
            scale: of adapters' products.
        """
        weight = whole[self.names[0]]
        if len(self.names) > 1:
            assert scale is not None
            a, b = (whole[name] for name in self.names[1:])
            product = whole_product(factors_of(self.pair, a, b), scale)
            weight = weight + product
        rows = weight[: self.pair.megatron_shape[0]]  # without the vocabulary's padding
        for name, part in zip(self.pair.hf, self.pair.rule.operation.split(rows), strict=True):
            if self.fp8 is not None and self.fp8.quantizes(name):
                yield from _quantized(name, part, self.fp8)
            else:
                yield name, part.to(self.kept)


def _quantized(name: str, weight: Tensor, fp8: BlockFp8) -> Iterator[tuple[str, Tensor]]:
    rows = rows_of(weight.cpu())
    codes, scales, _ = requantized(rows, None, power_of_two=fp8.has_power_of_two_scales)
    yield name, codes.tensor()
    yield f"{name}{SCALE_SUFFIX}", torch.from_numpy(scales)


def cargo_of(
    pair: Pair, parts: Mapping[str, list[Box]], dtype: torch.dtype, fp8: BlockFp8 | None
) -> Cargo:
    """What travels for a weight.

    Args:
        pair: the weight.
        parts: of every tensor that any rank holds, by name.
        dtype: to give out in; routers' selection biases stay fp32.
        fp8: what to give out in block FP8 instead.

    Raises:
        UserError: some of it is on no rank, on two, or of another shape than the preset's.
    """
    names = (pair.megatron, *(f"{linear_of(pair)}{name}" for name in (LORA_A, LORA_B)))
    if not any(name in parts for name in names[1:]):
        names = names[:1]
    for name in names:
        _require_whole(name, parts)
    _require_shape(pair, parts[pair.megatron][0].whole)
    kept = torch.float32 if pair.rule.is_fp32 else dtype
    num_added = sum(math.prod(parts[name][0].whole) for name in names[1:])
    is_quantized = fp8 is not None and any(map(fp8.quantizes, pair.hf))
    on_the_way = torch.float32 if num_added or is_quantized else kept
    return Cargo(pair, names, pair.num_elements + num_added, on_the_way, kept, fp8)


def _require_whole(name: str, parts: Mapping[str, Sequence[Box]]) -> None:
    if name not in parts:
        raise UserError(f"no rank holds '{name}', which the preset calls for")
    whole = parts[name][0].whole
    num_held = sum(math.prod(box.shape) for box in parts[name])
    if num_held != math.prod(whole):
        raise UserError(f"'{name}' is {list(whole)}; {num_held:,} elements of it are on some rank")


def _require_shape(pair: Pair, whole: tuple[int, ...]) -> None:
    expected = pair.megatron_shape
    is_padded = pair.rule.is_vocabulary and whole[0] >= expected[0]
    if whole[1:] != expected[1:] or not (is_padded or whole[0] == expected[0]):
        raise UserError(f"'{pair.megatron}' is {list(whole)}; the preset expects {list(expected)}")
