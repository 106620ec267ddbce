"""One tensor at a time out of a Megatron ``torch_dist`` checkpoint: no model, no process group.

Megatron saves with ``megatron.core.dist_checkpointing`` on top of torch's distributed checkpoint:
``.metadata`` says which global tensor has which chunks in which file, at whatever TP/EP/PP layout
they were written. Reading asks for a box of a global tensor; the optimizer's tensors lie in the
same files and are never touched.

Names are those of ``GPTModel.state_dict()`` at TP1/EP1/PP1 with the local spec; ``stored_names``
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
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_k2.checkpoint.mapped_files import MappedFiles
from megatron_k2.checkpoint.stored_names import Location, locate
from megatron_k2.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"

RELEASE = "release"
"""Megatron's name for weights without a history: tracker text and directory; it loads them as
iteration 0, without optimizer, scheduler and random state, with or without ``--finetune``."""

NOT_WEIGHTS = re.compile(
    r"^(optimizer\.|chained_\d+\.|rng_state|common_state|rerun_state|opt_param_scheduler)"
    r"|\._extra_state"
)
"""Keys beside the model's tensors: optimizer, random state, common state, Transformer Engine's."""

_COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True)
class _Overlap:
    """The part of a chunk that falls into a box, as indices on either side."""

    source: tuple[int | slice, ...]
    target: tuple[slice, ...]


def _overlap(
    chunk: ChunkStorageMetadata,
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
        self._reader = FileSystemReader(directory)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except FileNotFoundError:
            raise UserError(
                f"{directory} has no .metadata: not a torch_dist checkpoint, or its save did not "
                "finish; choose another with --iteration"
            ) from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        _require_whole_files(directory, self._metadata)
        self.locations: dict[str, Location] = dict(_locate_all(self._metadata))
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._files = MappedFiles()
        self._layouts: dict[bytes, Tensor] = {}
        """Pickled layout -> tensor without data; tensors of one shape have one."""

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """What was saved beside tensors: ``args``, ``iteration``; empty if nothing was."""
        legacy = self.directory / "common.pt"
        if legacy.exists():
            return dict(_unpickle(legacy.read_bytes()))
        info = self._metadata.storage_data.get(MetadataIndex(_COMMON_STATE))
        if info is None:
            return {}
        with (self.directory / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            (state,) = _unpickle(stream.read(info.length))
        return dict(state)

    @property
    def args(self) -> Namespace | None:
        """Megatron's arguments of the run that saved this, None if it saved none."""
        return self.common.get("args")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every model tensor, vocabulary padding included."""
        return {name: location.shape for name, location in self.locations.items()}

    @property
    def num_other_bytes(self) -> int:
        """Of the tensors that are no weights: the optimizer's."""
        return sum(
            math.prod(stored.size) * stored.properties.dtype.itemsize
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and NOT_WEIGHTS.search(key)
        )

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor: a view of the mapped file where one chunk holds them, else a copy.

        Args:
            name: as in ``GPTModel.state_dict()``.
            rows: which; the step must be 1. Leaves out vocabulary padding before it is read.

        Returns:
            The rows, in the dtype they were saved in; do not write to them.

        Raises:
            UserError: if a chunk is missing or cannot be decoded.
        """
        location = self.locations[name]
        begin, end, _ = rows.indices(location.shape[0])
        shape = (end - begin, *location.shape[1:])
        first = (begin, *(0 for _ in shape[1:]))
        destination: Tensor | None = None
        num_covered = 0
        for chunk in self._chunks_at(location):
            overlap = _overlap(chunk, location.leading, first, shape)
            if overlap is None:
                continue
            stored = self._mapped(location, chunk)[overlap.source]
            if stored.numel() == math.prod(shape) and stored.is_contiguous():
                return stored.view(shape)
            if destination is None:
                destination = torch.empty(shape, dtype=location.dtype)
            destination[overlap.target] = stored
            num_covered += stored.numel()
        if destination is None or num_covered != destination.numel():
            raise UserError(f"{self.directory}: chunks of '{location.key}' do not cover '{name}'")
        return destination

    def _chunks_at(self, location: Location) -> list[ChunkStorageMetadata]:
        """Chunks that hold a part of this layer or expert; a layer of K2 has 768 in one key."""
        if location.key not in self._chunks:
            stored = self._metadata.state_dict_metadata[location.key]
            assert isinstance(stored, TensorStorageMetadata)  # only those have a location
            by_leading: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in stored.chunks:
                num = len(location.leading)
                stacked = zip(chunk.offsets[:num], chunk.sizes[:num], strict=True)
                for leading in itertools.product(*(range(o, o + s) for o, s in stacked)):
                    by_leading[leading].append(chunk)
            self._chunks[location.key] = by_leading
        return self._chunks[location.key].get(location.leading, [])

    def _mapped(self, location: Location, chunk: ChunkStorageMetadata) -> Tensor:
        """A whole chunk as a view of its file.

        A chunk is a ``torch.save`` archive; its one storage record lies there uncompressed. The
        pickled layout is looked at first (on the meta device, no data): a chunk that is a view of
        more than itself is decoded by torch instead.
        """
        info = self._metadata.storage_data[MetadataIndex(location.key, chunk.offsets)]
        path = self.directory / info.relative_path
        try:
            with path.open("rb") as stream:
                opened = self._reader._slice_file(stream, info)
                archive: Any = torch._C.PyTorchFileReader(opened)  # its stub is incomplete
                pickled = archive.get_record("data.pkl")
                if pickled not in self._layouts:
                    opened.seek(0)
                    layout = torch.load(opened, map_location="meta", weights_only=True)
                    self._layouts[pickled] = layout
                layout = self._layouts[pickled]
                if not layout.is_contiguous() or layout.untyped_storage().nbytes() != layout.nbytes:
                    opened.seek(0)
                    return torch.load(opened, map_location="cpu", weights_only=True)
                offset = archive.get_record_offset("data/0")
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path}: '{location.key}' cannot be read ({error}); the shard is "
                "damaged: choose an earlier checkpoint with --iteration"
            ) from error
        flat = torch.frombuffer(
            self._files.map(path),
            dtype=layout.dtype,
            count=layout.numel(),
            offset=info.offset + offset,
        )
        return flat.view(layout.shape)

    @override
    def __repr__(self) -> str:
        return f"MegatronSource({self.directory}, {len(self.locations)} tensors)"


def _unpickle(archive: bytes) -> Any:
    """A ``torch.save`` archive without tensors, by classes known to be harmless.

    Megatron, seconds to import, is asked for its own classes only where an archive has them.
    """
    with torch.serialization.safe_globals([Namespace]):
        try:
            return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            pass
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals(SAFE_GLOBALS):
        found = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    return _unpickle(found.getvalue()) if isinstance(found, io.BytesIO) else found


def find_iteration(checkpoint_dir: Path, iteration: int | None = None) -> Path:
    """The ``iter_*`` directory of a run's checkpoint directory.

    Args:
        checkpoint_dir: what was given to ``--save``, or one of its ``iter_*`` directories.
        iteration: which; default: the one the tracker file names.

    Raises:
        UserError: if there is none; the message lists what is there.
    """
    if not checkpoint_dir.is_dir():
        raise UserError(
            f"{checkpoint_dir}: no such directory; expected Megatron's --save directory"
        )
    if (checkpoint_dir / ".metadata").exists():
        return checkpoint_dir
    present = sorted(int(p.name[5:]) for p in checkpoint_dir.glob("iter_[0-9]*") if p.is_dir())
    if iteration is None:
        if _is_release(checkpoint_dir):
            return checkpoint_dir / RELEASE
        iteration = _tracked_iteration(checkpoint_dir, present)
    found = checkpoint_dir / f"iter_{iteration:07d}"
    if not found.is_dir():
        have = ", ".join(map(str, present)) or "none"
        raise UserError(f"{checkpoint_dir} has no iteration {iteration}; saved are: {have}")
    return found


def _is_release(checkpoint_dir: Path) -> bool:
    """Whether the tracker names weights without a training history, as an import writes them."""
    tracker = checkpoint_dir / TRACKER
    return tracker.exists() and tracker.read_text().strip() == RELEASE


def _tracked_iteration(checkpoint_dir: Path, present: list[int]) -> int:
    tracker = checkpoint_dir / TRACKER
    if not tracker.exists():
        if not present:
            raise UserError(f"{checkpoint_dir} holds no checkpoint: neither {TRACKER} nor iter_*")
        raise UserError(
            f"{checkpoint_dir} has no {TRACKER}, so which checkpoint is complete is not known; "
            f"choose one with --iteration: {', '.join(map(str, present))}"
        )
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise UserError(f"{tracker} says '{text}', expected an iteration number; use --iteration")
    return int(text)


def _require_whole_files(directory: Path, metadata: Metadata) -> None:
    """Compare each file's length with the furthest byte ``.metadata`` places in it."""
    end: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        end[info.relative_path] = max(end.get(info.relative_path, 0), info.offset + info.length)
    for name, expected_bytes in sorted(end.items()):
        path = directory / name
        if not path.exists():
            raise UserError(f"{path} is missing, though .metadata refers to it")
        if (actual_bytes := path.stat().st_size) < expected_bytes:
            raise UserError(
                f"{path} is truncated: {actual_bytes} bytes, .metadata places data up to "
                f"{expected_bytes}; copy it again or choose another --iteration"
            )


def _locate_all(metadata: Metadata) -> Iterator[tuple[str, Location]]:
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata) and not NOT_WEIGHTS.search(key):
            yield from locate(key, tuple(stored.size), stored.properties.dtype)
