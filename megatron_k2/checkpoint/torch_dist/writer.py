"""Write a Megatron ``torch_dist`` checkpoint tensor by tensor: no model, no process group.

The counterpart of ``reader``, which describes the format. A global tensor is written as
row chunks, each a ``torch.save`` archive in a ``.distcp`` file; ``.metadata`` says where they are.
Megatron's loader asks for boxes of global tensors, so the result loads at any TP/EP/PP.

``_extra_state`` entries, which Megatron's linear layers save though the local ones have nothing to
say, are written too (they all point at one archive), because its loader asks for them.
"""

import io
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_k2.checkpoint.names.mapping import Pair
from megatron_k2.checkpoint.names.megatron_keys import STACKED_EXPERTS, TransformerImpl, stored_key
from megatron_k2.checkpoint.stream.rows import BY_TORCH_NAME, Dtype, Rows
from megatron_k2.checkpoint.torch_dist import archive
from megatron_k2.checkpoint.torch_dist.metadata import (
    Extent,
    GlobalTensor,
    Index,
    StoredChunk,
    write_index,
)
from megatron_k2.checkpoint.torch_dist.reader import COMMON_STATE
from megatron_k2.files import write_atomically

_HAS_EXTRA_STATE: dict[TransformerImpl, re.Pattern[str]] = {
    "local": re.compile(
        r"\.(eh_proj|linear_proj|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|linear_fc[12])"
        r"\.weight$"
    ),
    "te": re.compile(r"(\.(eh_proj|linear_[a-z_]+|linear_fc[12])|norm)\.weight$"),
}
"""Megatron's tensor-parallel linears; with Transformer Engine every linear, and norms that are
modules of their own. A loader passes over what it does not ask for."""

_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class Destination:
    """Where a Megatron tensor goes: the stored key, and its place in a stack of experts."""

    pair: Pair
    key: str
    leading: tuple[int, ...]
    """(expert,) for a routed expert, else ()."""
    size: tuple[int, ...]
    """Of the stored tensor."""
    dtype: Dtype


def destination_of(
    pair: Pair, num_experts: int, dtype: Dtype, modules: TransformerImpl = "local"
) -> Destination:
    """As Megatron 0.19 stores it: a layer's experts are one tensor, layers are apart."""
    key = stored_key(pair, modules)
    if pair.expert is None:
        return Destination(pair, key, (), pair.megatron_shape, dtype)
    return Destination(pair, key, (pair.expert,), (num_experts, *pair.megatron_shape), dtype)


@dataclass(frozen=True)
class WrittenChunk:
    """Rows of a stored tensor, written."""

    key: str
    size: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    file_offset: int
    file_length: int


def chunk_from(entry: Sequence[Any]) -> WrittenChunk:
    """A chunk that a receipt (JSON, which has no tuples) remembers."""
    fields: list[Any] = [tuple(value) if isinstance(value, list) else value for value in entry]
    return WrittenChunk(*fields)


def write_chunk(
    file: IO[bytes], destination: Destination, first_row: int, rows: Rows
) -> WrittenChunk:
    """Append rows of a tensor to an open ``.distcp`` file.

    Args:
        file: positioned at its end.
        destination: of the Megatron tensor.
        first_row: of the rows in it.
        rows: of the destination's dtype.
    """
    ones, zeros = (1,) * len(destination.leading), (0,) * (len(rows.shape) - 1)
    lengths = (*ones, *rows.shape)
    stacked = Rows(rows.bits.reshape(lengths), rows.dtype)
    return WrittenChunk(
        destination.key,
        destination.size,
        destination.dtype.torch_name,
        (*destination.leading, first_row, *zeros),
        lengths,
        *archive.write_tensor(file, stacked),
    )


def write_common(directory: Path, file: str, args: Namespace) -> dict[str, Extent]:
    """The objects beside the tensors, in one small file: key -> where it is.

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
    content = io.BytesIO()
    objects = {COMMON_STATE: [state], _EXTRA_STATE: [None]}
    extents = {
        key: Extent(file, *archive.write_object(content, value)) for key, value in objects.items()
    }
    write_atomically(directory / file, content.getvalue())
    return extents


def write_metadata(
    directory: Path,
    chunks: Iterable[tuple[str, WrittenChunk]],
    common: Mapping[str, Extent],
    modules: TransformerImpl = "local",
) -> None:
    """What makes a directory of files a checkpoint.

    Args:
        directory: of the checkpoint.
        chunks: file and chunk, of every tensor.
        common: what ``write_common`` wrote.
        modules: whose the loading model is built of.
    """
    tensors: dict[str, GlobalTensor] = {}
    for file, chunk in chunks:
        if chunk.key not in tensors:
            tensors[chunk.key] = GlobalTensor(chunk.size, BY_TORCH_NAME[chunk.dtype])
        extent = Extent(file, chunk.file_offset, chunk.file_length)
        tensors[chunk.key].chunks.append(StoredChunk(chunk.offsets, chunk.lengths, extent))
    extra = dict.fromkeys(_extra_state_keys(tensors, modules), common[_EXTRA_STATE])
    write_index(directory, Index(tensors, {**extra, COMMON_STATE: common[COMMON_STATE]}))


def _extra_state_keys(
    tensors: Mapping[str, GlobalTensor], modules: TransformerImpl
) -> Iterator[str]:
    for key, stored in tensors.items():
        if modules == "te" and key.endswith("self_attention.linear_proj.weight"):
            yield key.replace("linear_proj.weight", "core_attention._extra_state/shard_0_1")
        if not _HAS_EXTRA_STATE[modules].search(key):
            continue
        module = key.removesuffix("weight")
        num = stored.size[0] if STACKED_EXPERTS in key else 1
        for index in range(num):
            yield f"{module}_extra_state/shard_{index}_{num}"
