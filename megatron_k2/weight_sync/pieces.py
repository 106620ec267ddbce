"""What this rank holds of a sharded model, under the names of ``checkpoint/names``.

Which rank holds what is what Megatron says for a checkpoint, ``sharded_state_dict``: the same
layouts, and the same seam. Nothing is copied, and nothing of a round is kept for the next: a
parameter whose storage was exchanged in between is seen anew.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_k2.checkpoint.names.megatron_keys import locate
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.model.lora.model import AdapterGPTModel


@dataclass(frozen=True)
class Box:
    """A part of one tensor, and who sends it."""

    megatron: str
    """The tensor's name in ``checkpoint/names/rules``."""
    offset: tuple[int, ...]
    """Of the part's first element in the whole."""
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of the tensor, vocabulary padding included."""
    rank: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.shape == self.whole

    def of(self, tensor: Tensor) -> Tensor:
        """The part's place in a whole tensor."""
        for axis, (begin, size) in enumerate(zip(self.offset, self.shape, strict=True)):
            tensor = tensor.narrow(axis, begin, size)
        return tensor


def pieces_of(stages: Sequence[torch.nn.Module], rank: int) -> Iterator[tuple[Box, Tensor]]:
    """Parts that this rank holds and no other rank has to send.

    Args:
        stages: this rank's model, one for each virtual stage; wrapped or not.
        rank: this one's, in the group whose ranks together hold the model.

    Raises:
        UserError: a frozen base is held in block FP8.
    """
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    named = functools.cache(_names_in)  # an expert's entry lists all experts of its layer
    for stage in unwrap_model(list(stages)):
        state = _described(stage, metadata)
        apply_factories(state)
        for entry in nested_values(state):
            if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id):
                yield from _parts(entry, named(entry.key, tuple(entry.global_shape)), rank)


def _described(stage: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """All that a stage holds: a model with adapters saves those alone."""
    if isinstance(stage, AdapterGPTModel):
        return stage.whole_sharded_state_dict(metadata=metadata)
    state: dict[str, Any] = stage.sharded_state_dict(metadata=metadata)
    return state


def lora_scale(stages: Sequence[torch.nn.Module]) -> float | None:
    """What products of adapters are multiplied by, the same on every rank; None: it has none.

    Raises:
        UserError: the frozen base is held in a form that cannot be sent.
    """
    adapted = [s for s in unwrap_model(list(stages)) if isinstance(s, AdapterGPTModel)]
    for stage in adapted:
        stage.require_plain_base()
    return adapted[0].lora.scale if adapted else None


def _names_in(key: str, shape: tuple[int, ...]) -> dict[tuple[int, ...], str]:
    """Names of the tensors that a stored one stacks, by their place in it."""
    dtype = Dtype.FP32  # not asked for: only names and places are
    return {place.leading: name for name, place in locate(key, shape, dtype)}


def _parts(
    entry: ShardedTensor, names: Mapping[tuple[int, ...], str], rank: int
) -> Iterator[tuple[Box, Tensor]]:
    """A stored tensor's parts; stacked layers and experts are apart here."""
    assert entry.data is not None
    num_leading = len(next(iter(names)))
    stacked = [(entry.global_offset[: entry.prepend_axis_num], entry.data.detach())]
    for axis in range(entry.prepend_axis_num, num_leading):
        first = entry.global_offset[axis]
        stacked = [
            ((*leading, first + i), part)
            for leading, whole in stacked
            for i, part in enumerate(whole.unbind())
        ]
    for leading, data in stacked:
        yield (
            Box(
                names[leading],
                tuple(entry.global_offset[num_leading:]),
                tuple(data.shape),
                tuple(entry.global_shape[num_leading:]),
                rank,
            ),
            data,
        )


def by_name(boxes: Sequence[Box]) -> dict[str, list[Box]]:
    """Parts of each tensor, in the order in which they are listed."""
    found: dict[str, list[Box]] = {}
    for box in boxes:
        found.setdefault(box.megatron, []).append(box)
    return found


def in_order(boxes: Sequence[Box]) -> list[Box]:
    """The same list on every rank."""
    return sorted(boxes, key=lambda box: (box.megatron, box.offset, box.rank))
