"""One tensor at a time out of a Megatron ``torch_dist`` checkpoint: no model, no process group.

Megatron saves with ``megatron.core.dist_checkpointing`` on top of torch's distributed checkpoint:
``.metadata`` says which global tensor has which chunks in which file, at whatever TP/EP/PP layout
they were written. Reading asks for a box of a global tensor; the optimizer's tensors lie in the
same files and are never touched. Neither Megatron nor torch is imported (``archive``).

Names are those of ``GPTModel.state_dict()`` at TP1/EP1/PP1 with the local spec; ``megatron_keys``
undoes where storage differs. Experts are stored one chunk (two for gate and up) each, so reading
one reads no other.

Common state (``args``, ``iteration``) is an object inside the checkpoint from 0.19 on and
``common.pt`` before; Megatron's own loader reads both.
"""

import functools
import io
import itertools
import math
import pickle
import re
import struct
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import numpy as np

from megatron_k2.checkpoint.names.megatron_keys import Location, locate
from megatron_k2.checkpoint.stream.mapped_files import MappedFiles, bring_in, shortened
from megatron_k2.checkpoint.stream.rows import Dtype, Rows
from megatron_k2.checkpoint.torch_dist import archive
from megatron_k2.checkpoint.torch_dist.metadata import Extent, Index, StoredChunk, read_index
from megatron_k2.checkpoint.torch_dist.pickles import Resolve
from megatron_k2.errors import UserError

NOT_WEIGHTS = re.compile(
    r"^(optimizer\.|chained_\d+\.|rng_state|common_state|rerun_state|opt_param_scheduler)"
    r"|\._extra_state"
)
"""Keys beside the model's tensors: optimizer, random state, common state, Transformer Engine's."""

COMMON_STATE = "common_state/shard_0_1"

_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError)
_UNREADABLE = (*_DAMAGE, struct.error, pickle.UnpicklingError)


@dataclass(frozen=True)
class _Overlap:
    """The part of a chunk that falls into a box, as indices on either side."""

    source: tuple[int | slice, ...]
    target: tuple[slice, ...]


def _overlap(
    chunk: StoredChunk,
    leading: tuple[int, ...],
    first: tuple[int, ...],
    shape: tuple[int, ...],
) -> _Overlap | None:
    """Of a chunk and the box [first, first + shape) at the stacked indices ``leading``."""
    at, size = list(chunk.offsets), list(chunk.sizes)
    num = len(leading)
    source: list[int | slice] = [i - o for i, o in zip(leading, at[:num], strict=True)]
    target: list[slice] = []
    for o, s, f, n in zip(at[num:], size[num:], first, shape, strict=True):
        begin, end = max(o, f), min(o + s, f + n)
        if begin >= end:
            return None
        source.append(slice(begin - o, end - o))
        target.append(slice(begin - f, end - f))
    return _Overlap(tuple(source), tuple(target))


class MegatronSource:
    """An opened ``iter_*`` directory: names with their shapes, and one tensor on request."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = read_index(directory)
        _require_whole_files(directory, self.index)
        self.locations: dict[str, Location] = dict(_locate_all(self.index))
        self._chunks: dict[str, dict[tuple[int, ...], list[StoredChunk]]] = {}
        self._files = MappedFiles()

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """What was saved beside tensors, ``args``, ``iteration``; empty if nothing was.

        Values of classes other than Python's own are ``pickles``'s stand-ins.
        """
        return self.read_common(lambda module, name: None)

    def read_common(self, resolve: Resolve) -> dict[str, Any]:
        """``common``, with true values of the classes that ``resolve`` knows."""
        legacy = self.directory / "common.pt"
        if legacy.exists():
            state = self._read_object(Extent(legacy.name, 0, legacy.stat().st_size), resolve)
            return dict(state)
        extent = self.index.objects.get(COMMON_STATE)
        if extent is None:
            return {}
        (state,) = self._read_object(extent, resolve)
        return dict(state)

    def _read_object(self, extent: Extent, resolve: Resolve) -> Any:
        try:
            found = archive.read_object(self._view(extent), resolve)
            if isinstance(found, io.BytesIO):  # Megatron packs it, and the planner once more
                found = archive.read_object(found.getbuffer(), resolve)
        except _UNREADABLE as error:
            path = self.directory / extent.file
            raise UserError(
                f"{path}: what was saved beside the tensors cannot be read ({error}); choose an "
                "earlier checkpoint with --iteration"
            ) from error
        return found

    @property
    def args(self) -> Namespace | None:
        """Megatron's arguments of the run that saved this, None if it saved none."""
        return self.common.get("args")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every model tensor, vocabulary padding included."""
        return {name: location.shape for name, location in self.locations.items()}

    def dtype(self, name: str) -> Dtype:
        """How one tensor is stored."""
        return self.locations[name].dtype

    @property
    def num_other_bytes(self) -> int:
        """Bytes of the tensors that are not weights: the optimizer's."""
        tensors = self.index.tensors.items()
        return sum(stored.num_bytes for key, stored in tensors if NOT_WEIGHTS.search(key))

    def read(self, name: str, rows: slice = slice(None), *, is_computed: bool = False) -> Rows:
        """Rows of one tensor: a view of the mapped file where one chunk holds them, else a copy.

        Args:
            name: as in ``GPTModel.state_dict()``.
            rows: which; the step must be 1. Leaves out vocabulary padding before it is read.
            is_computed: whether they are computed with: a copy in any case.

        Returns:
            The rows, in the dtype they were saved in; do not write to them.

        Raises:
            UserError: if a chunk is missing or cannot be decoded.
        """
        location = self.locations[name]
        begin, end, _ = rows.indices(location.shape[0])
        shape = (end - begin, *location.shape[1:])
        first = (begin, *(0 for _ in shape[1:]))
        whole: np.ndarray | None = None
        num_covered = 0
        for chunk in self._chunks_at(location):
            overlap = _overlap(chunk, location.leading, first, shape)
            if overlap is None:
                continue
            stored = self._mapped(location, chunk).bits[overlap.source]
            if stored.size == math.prod(shape) and stored.flags.c_contiguous:
                path = self.directory / chunk.extent.file
                one = stored.reshape(shape)
                found = self._files.settled(one, path) if is_computed else bring_in(one, path)
                return Rows(found, location.dtype)
            if whole is None:
                whole = np.empty(shape, location.dtype.numpy)
            whole[overlap.target] = stored
            num_covered += stored.size
        if whole is None or num_covered != whole.size:
            raise UserError(f"{self.directory}: chunks of '{location.key}' do not cover '{name}'")
        return Rows(whole, location.dtype)

    def _chunks_at(self, location: Location) -> list[StoredChunk]:
        """Chunks that hold a part of this layer or expert; a layer of K2 has 768 in one key."""
        if location.key not in self._chunks:
            by_leading: dict[tuple[int, ...], list[StoredChunk]] = defaultdict(list)
            for chunk in self.index.tensors[location.key].chunks:
                num = len(location.leading)
                stacked = zip(chunk.offsets[:num], chunk.sizes[:num], strict=True)
                for leading in itertools.product(*(range(o, o + s) for o, s in stacked)):
                    by_leading[leading].append(chunk)
            self._chunks[location.key] = by_leading
        return self._chunks[location.key].get(location.leading, [])

    def _mapped(self, location: Location, chunk: StoredChunk) -> Rows:
        """A whole chunk as a view of its file."""
        view = self._view(chunk.extent)
        try:
            found = archive.read_tensor(view)
            if (found.shape, found.dtype) != (chunk.sizes, location.dtype):
                raise ValueError(f"{found.dtype} {list(found.shape)} is not what .metadata says")
        except _UNREADABLE as error:
            raise UserError(
                f"{self.directory / chunk.extent.file}: '{location.key}' cannot be read ({error}); "
                "the shard is damaged: choose an earlier checkpoint with --iteration"
            ) from error
        return found

    def _view(self, extent: Extent) -> memoryview:
        path = self.directory / extent.file
        mapped = memoryview(self._files.map(path))
        if len(mapped) < extent.offset + extent.length:  # was looked at as it was opened
            raise shortened(path)
        return mapped[extent.offset : extent.offset + extent.length]

    @override
    def __repr__(self) -> str:
        return f"MegatronSource({self.directory}, {len(self.locations)} tensors)"


def _require_whole_files(directory: Path, index: Index) -> None:
    """Compare each file's length with the furthest byte ``.metadata`` places in it."""
    end: dict[str, int] = {}
    for extent in index.extents():
        end[extent.file] = max(end.get(extent.file, 0), extent.offset + extent.length)
    for name, expected_bytes in sorted(end.items()):
        path = directory / name
        if not path.exists():
            raise UserError(f"{path} is missing, though .metadata refers to it")
        if (actual_bytes := path.stat().st_size) < expected_bytes:
            raise UserError(
                f"{path} is truncated: {actual_bytes} bytes, .metadata places data up to "
                f"{expected_bytes}; copy it again or choose another --iteration"
            )


def _locate_all(index: Index) -> Iterator[tuple[str, Location]]:
    for key, stored in index.tensors.items():
        if not NOT_WEIGHTS.search(key):
            yield from locate(key, stored.size, stored.dtype)
