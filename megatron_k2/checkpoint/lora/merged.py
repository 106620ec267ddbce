"""A base and its adapters read as one checkpoint: ``W + (alpha / rank) B A`` in fp32."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_k2.checkpoint.lora.adapters import AdapterSource, whole_product
from megatron_k2.checkpoint.names.mapping import Pair
from megatron_k2.checkpoint.stream.rows import Dtype, Rows, rows_of
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource

if TYPE_CHECKING:
    from torch import Tensor


class RowSource(Protocol):
    """Where rows of a run's tensors come from: its checkpoint, or one with adapters merged in."""

    directory: Path

    def dtype(self, name: str) -> Dtype:
        """How one tensor is stored."""

    def read(self, name: str, rows: slice, *, is_computed: bool) -> Rows:
        """Rows of one tensor, by its name in ``rules``; not to be written to.

        ``is_computed``: whether they are computed with, and not only written out.
        """


class MergedSource:
    """The base's tensors, those beside which an adapter stands with its product added.

    Added to the stored weight before anything is cut, transposed or rounded, so that a row is what
    a merge of whole matrices gives, to the last bit, however many are read at a time.
    """

    def __init__(self, base: MegatronSource, adapters: AdapterSource, pairs: list[Pair]) -> None:
        self._base, self._adapters = base, adapters
        self.directory: Path = base.directory
        self._pairs = {pair.megatron: pair for pair in pairs if adapters.has(pair)}
        self._last: tuple[str, Tensor] | None = None

    def dtype(self, name: str) -> Dtype:
        """fp32 for what is merged, else as the base stores it."""
        return Dtype.FP32 if name in self._pairs else self._base.dtype(name)

    def read(self, name: str, rows: slice = slice(None), *, is_computed: bool = False) -> Rows:
        """Rows of one tensor; see ``MegatronSource.read``."""
        if name not in self._pairs:
            return self._base.read(name, rows, is_computed=is_computed)
        weight = self._base.read(name, rows, is_computed=True).to(Dtype.FP32).tensor()
        return rows_of(weight + self._product(name)[rows])

    def _product(self, name: str) -> "Tensor":
        """Of the whole weight; kept until another is asked for, since rows come in order."""
        if self._last is None or self._last[0] != name:
            self._last = None
            factors = self._adapters.factors(self._pairs[name])
            self._last = (name, whole_product(factors, self._adapters.scale))
        return self._last[1]


def describe_merge(adapters: AdapterSource, pairs: list[Pair]) -> str:
    """What was merged, a sentence."""
    changed = sum(adapters.has(pair) for pair in pairs)
    return (
        f"{changed:,} of {len(pairs):,} tensors with adapters of rank {adapters.rank} from "
        f"{adapters.source.directory} added, over {adapters.base_directory}"
    )
