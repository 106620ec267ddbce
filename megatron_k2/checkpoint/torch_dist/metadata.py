"""``.metadata`` of a ``torch_dist`` checkpoint: which global tensor has which chunks in which file.

The file is a pickle of torch's classes (``torch.distributed.checkpoint.metadata``); what of them a
conversion needs is here as plain records. The optimizer's tensors are in it like the model's.
"""

import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.stream.rows import BY_TORCH_NAME, Dtype
from megatron_k2.checkpoint.torch_dist.pickles import Instance, read_pickle, stand_in, write_pickle
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.run.iterations import BACKEND_RECORD, METADATA

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


@dataclass(frozen=True)
class Extent:
    """A run of bytes in one of the checkpoint's files."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredChunk:
    """A box of a global tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor whatever its layout was when it was saved."""

    size: tuple[int, ...]
    dtype: Dtype
    chunks: list[StoredChunk] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor, all chunks together."""
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True)
class Index:
    """What ``.metadata`` lists: every tensor with its chunks, and every other object."""

    tensors: dict[str, GlobalTensor]
    objects: dict[str, Extent]
    """Key -> where the pickle of something other than a tensor lies."""

    def extents(self) -> Iterable[Extent]:
        """Every run of bytes that a tensor's chunk or an object takes."""
        for tensor in self.tensors.values():
            yield from (chunk.extent for chunk in tensor.chunks)
        yield from self.objects.values()


@dataclass
class _Metadata:
    """The fields are torch's: it gives them by name (``BUILD``), or in this order."""

    state_dict_metadata: dict[str, Any]
    planner_data: Any = None
    storage_data: Any = None


@dataclass
class _TensorStorage:
    properties: Any
    size: tuple[int, ...]
    chunks: list[Any]


@dataclass
class _ChunkStorage:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(unsafe_hash=True)
class _MetadataIndex:
    fqn: str
    offset: tuple[int, ...] | None = None
    index: int | None = field(default=None, hash=False, compare=False)


@dataclass
class _StorageInfo:
    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None


_CLASSES = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _TensorStorage,
    (_METADATA, "ChunkStorageMetadata"): _ChunkStorage,
    (_METADATA, "MetadataIndex"): _MetadataIndex,
    (_FILESYSTEM, "_StorageInfo"): _StorageInfo,
}


def read_index(directory: Path) -> Index:
    """What ``directory`` holds.

    Raises:
        UserError: if there is no ``.metadata``, or it cannot be read.
    """
    path = directory / METADATA
    if not path.is_file():
        raise UserError(
            f"{directory} has no {METADATA}: not a torch_dist checkpoint, or its save did not "
            "finish; choose another with --iteration"
        )
    try:
        found = read_pickle(path.read_bytes(), lambda module, name: _CLASSES.get((module, name)))
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --iteration") from error
    if not isinstance(found, _Metadata) or not isinstance(found.storage_data, dict):
        raise UserError(f"{path} holds {found!r}, expected torch's Metadata with files")
    extents = {index: _extent(path, index, info) for index, info in found.storage_data.items()}
    tensors: dict[str, GlobalTensor] = {}
    for key, stored in found.state_dict_metadata.items():
        if isinstance(stored, _TensorStorage):
            tensors[key] = _global_tensor(path, key, stored, extents)
    objects = {index.fqn: at for index, at in extents.items() if index.fqn not in tensors}
    return Index(tensors, objects)


def _extent(path: Path, index: _MetadataIndex, info: _StorageInfo) -> Extent:
    if info.transform_descriptors:
        raise UserError(
            f"{path}: '{index.fqn}' was written through {info.transform_descriptors}, which is "
            "not read here; save without compression"
        )
    return Extent(info.relative_path, info.offset, info.length)


def _global_tensor(
    path: Path, key: str, stored: _TensorStorage, extents: Mapping[_MetadataIndex, Extent]
) -> GlobalTensor:
    properties = stored.properties
    state = properties.state if isinstance(properties, Instance) else None
    named = (state or getattr(properties, "args", None) or (None,))[0]
    name = getattr(named, "name", None)
    if name not in BY_TORCH_NAME:
        known = ", ".join(BY_TORCH_NAME)
        raise UserError(f"{path}: '{key}' has dtype {name}; readable are {known}")
    chunks = []
    for chunk in stored.chunks:
        at = extents.get(_MetadataIndex(key, tuple(chunk.offsets)))
        if at is None:
            raise UserError(f"{path} places '{key}' at {list(chunk.offsets)} in no file")
        chunks.append(StoredChunk(tuple(chunk.offsets), tuple(chunk.sizes), at))
    return GlobalTensor(tuple(stored.size), BY_TORCH_NAME[name], chunks)


def write_index(directory: Path, index: Index) -> None:
    """``.metadata`` and ``metadata.json``, which make a directory of files a checkpoint."""
    size_of = stand_in("torch", "Size")
    chunk_of = stand_in(_METADATA, "ChunkStorageMetadata")
    index_of = stand_in(_METADATA, "MetadataIndex")
    info_of = stand_in(_FILESYSTEM, "_StorageInfo")
    bytes_of = stand_in(_METADATA, "BytesStorageMetadata")
    chunks: dict[str, list[Instance]] = defaultdict(list)
    storage: dict[Instance, Instance] = {}
    for key, tensor in index.tensors.items():
        for chunk in tensor.chunks:
            offsets = size_of(chunk.offsets)
            chunks[key].append(chunk_of(offsets, size_of(chunk.sizes)))
            at = chunk.extent
            storage[index_of(key, offsets)] = info_of(at.file, at.offset, at.length)
    for key, at in index.objects.items():
        storage[index_of(key)] = info_of(at.file, at.offset, at.length)
    stored: dict[str, Instance] = {
        key: stand_in(_METADATA, "TensorStorageMetadata")(
            stand_in(_METADATA, "TensorProperties")(stand_in("torch", tensor.dtype.torch_name)),
            size_of(tensor.size),
            chunks[key],
        )
        for key, tensor in index.tensors.items()
    }
    stored |= {key: bytes_of() for key in index.objects}
    metadata = stand_in(_METADATA, "Metadata")(stored, None, storage)
    write_atomically(directory / METADATA, write_pickle(metadata))
    backend = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    write_atomically(directory / BACKEND_RECORD, backend)
