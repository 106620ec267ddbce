"""Write a Megatron ``torch_dist`` checkpoint tensor by tensor: no model, no process group.

The counterpart of ``megatron_source``, which describes the format. A global tensor is written as
row chunks, each a ``torch.save`` archive in a ``.distcp`` file; ``.metadata`` says where they are.
Megatron's loader asks for boxes of global tensors, so the result loads at any TP/EP/PP.

``_extra_state`` entries, which Megatron's linear layers save though the local ones have nothing to
say, are written too (they all point at one archive), because its loader asks for them.
"""

import contextlib
import io
import pickle
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_k2.checkpoint.mapping import Pair
from megatron_k2.checkpoint.stored_names import STACKED_EXPERTS, Modules, stored_key
from megatron_k2.data.storage import write_atomically

_HAS_EXTRA_STATE: dict[Modules, re.Pattern[str]] = {
    "local": re.compile(
        r"\.(eh_proj|linear_proj|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|linear_fc[12])"
        r"\.weight$"
    ),
    "te": re.compile(r"(\.(eh_proj|linear_[a-z_]+|linear_fc[12])|norm)\.weight$"),
}
"""Megatron's tensor-parallel linears; with Transformer Engine every linear, and norms that are
modules of their own. A loader passes over what it does not ask for."""

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}


@dataclass(frozen=True)
class Placement:
    """Where a Megatron tensor goes: the stored key, and its place in a stack of experts."""

    pair: Pair
    key: str
    leading: tuple[int, ...]
    """(expert,) for a routed expert, else ()."""
    size: tuple[int, ...]
    """Of the stored tensor."""
    dtype: torch.dtype


def place(
    pair: Pair, num_experts: int, dtype: torch.dtype, modules: Modules = "local"
) -> Placement:
    """As Megatron 0.19 stores it: a layer's experts are one tensor, layers are apart."""
    key = stored_key(pair, modules)
    if pair.expert is None:
        return Placement(pair, key, (), pair.megatron_shape, dtype)
    return Placement(pair, key, (pair.expert,), (num_experts, *pair.megatron_shape), dtype)


@dataclass(frozen=True)
class Chunk:
    """Rows of a stored tensor, written."""

    key: str
    size: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    file_offset: int
    file_length: int


def chunk_from(entry: Sequence[Any]) -> Chunk:
    """A chunk that a receipt (JSON, which has no tuples) remembers."""
    fields: list[Any] = [tuple(value) if isinstance(value, list) else value for value in entry]
    return Chunk(*fields)


def write_chunk(file: IO[bytes], placement: Placement, first_row: int, rows: Tensor) -> Chunk:
    """Append rows of a tensor to an open ``.distcp`` file.

    Args:
        file: positioned at its end.
        placement: of the Megatron tensor.
        first_row: of the rows in it.
        rows: contiguous and alone in its storage, of the placement's dtype.
    """
    ones, zeros = (1,) * len(placement.leading), (0,) * (rows.dim() - 1)
    begin = file.tell()
    torch.save(rows.view(*ones, *rows.shape), file)
    return Chunk(
        placement.key,
        placement.size,
        DTYPE_NAMES[placement.dtype],
        (*placement.leading, first_row, *zeros),
        (*ones, *rows.shape),
        begin,
        file.tell() - begin,
    )


@contextlib.contextmanager
def without_crc() -> Iterator[None]:
    """Torch writes checksums that no reader of it checks; they are half of the time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_common(directory: Path, file: str, args: Namespace) -> list[tuple[str, int, int]]:
    """The objects beside the tensors, in one small file; (key, offset, length) of each.

    Args:
        directory: of the checkpoint.
        file: name of the ``.distcp`` to write.
        args: Megatron's.
    """
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    entries, content = [], b""
    for key, value in (("common_state/shard_0_1", [state]), ("_extra_state", [None])):
        archive = io.BytesIO()
        torch.save(value, archive)
        entries.append((key, len(content), len(archive.getvalue())))
        content += archive.getvalue()
    write_atomically(directory / file, content)
    return entries


def write_metadata(
    directory: Path,
    chunks: Iterable[tuple[str, Chunk]],
    common_file: str,
    common: Sequence[tuple[str, int, int]],
    modules: Modules = "local",
) -> None:
    """``.metadata`` and ``metadata.json``, which make a directory of files a checkpoint.

    Args:
        directory: of the checkpoint.
        chunks: file and chunk, of every tensor.
        common_file: what ``write_common`` wrote.
        common: its entries.
        modules: whose the loading model is built of.
    """
    tensors: dict[str, Any] = {}
    by_key: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file, chunk in chunks:
        offsets = torch.Size(chunk.offsets)
        by_key[chunk.key].append(ChunkStorageMetadata(offsets, torch.Size(chunk.lengths)))
        storage[MetadataIndex(chunk.key, offsets)] = _StorageInfo(
            file, chunk.file_offset, chunk.file_length
        )
        if chunk.key not in tensors:
            properties = TensorProperties(dtype=getattr(torch, chunk.dtype))
            tensors[chunk.key] = TensorStorageMetadata(
                properties, torch.Size(chunk.size), by_key[chunk.key]
            )
    (common_key, *common_at), (_, *extra_at) = common
    objects = dict.fromkeys(_extra_state_keys(tensors, modules), extra_at) | {common_key: common_at}
    for key, (offset, length) in objects.items():
        storage[MetadataIndex(key)] = _StorageInfo(common_file, offset, length)
    stored = tensors | {key: BytesStorageMetadata() for key in objects}
    metadata = Metadata(state_dict_metadata=stored, storage_data=storage)
    write_atomically(directory / ".metadata", pickle.dumps(metadata))
    backend = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    write_atomically(directory / "metadata.json", backend)


def _extra_state_keys(tensors: dict[str, TensorStorageMetadata], modules: Modules) -> Iterator[str]:
    for key, stored in tensors.items():
        if modules == "te" and key.endswith("self_attention.linear_proj.weight"):
            yield key.replace("linear_proj.weight", "core_attention._extra_state/shard_0_1")
        if not _HAS_EXTRA_STATE[modules].search(key):
            continue
        module = key.removesuffix("weight")
        num = stored.size[0] if STACKED_EXPERTS in key else 1
        for index in range(num):
            yield f"{module}_extra_state/shard_{index}_{num}"
