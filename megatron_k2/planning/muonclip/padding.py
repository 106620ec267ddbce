"""How much larger than its parameters a ZeRO-1 buffer is, at any size, without building a model.

Megatron's own layout function, with our expert layout in it, runs on ``meta`` parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_k2.optimizer.sharded.expert_layout import expert_layout
from megatron_k2.planning.cost.shapes import Weight, rank_weights
from megatron_k2.planning.schedule.chunks import split_into_chunks
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class BufferSize:
    """Elements of one rank's buffers of one kind."""

    parameters: int
    padded: int
    num_cut: int
    """Matrices that lie on more than one data-parallel rank."""

    @property
    def ratio(self) -> float:
        """Padded over parameters; 1 is no padding."""
        return self.padded / self.parameters if self.parameters else 1.0


def buffer_layouts(
    weights: Sequence[Weight],
    *,
    data_ranks: int,
    expert_data_ranks: int,
    bucket_size: int | None,
    has_expert_parallel: bool,
) -> tuple[list[torch.nn.Parameter], dict[Any, Any]]:
    """A ``meta`` parameter for each weight, and Megatron's layout of their buffers.

    Args:
        weights: of one rank, in the order of Megatron's modules.
        data_ranks: data x context parallel.
        expert_data_ranks: ranks that hold the same experts.
        bucket_size: see ``whole_matrix_layout``.
        has_expert_parallel: otherwise experts sit among the dense parameters.
    """
    params = []
    for weight in weights:
        param = torch.nn.Parameter(torch.empty(weight.shape, device="meta", dtype=torch.bfloat16))
        param.allreduce = not (weight.is_expert and has_expert_parallel)  # type: ignore[attr-defined]
        params.append(param)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, bucket_size=bucket_size
    )
    with expert_layout():
        full = DistributedOptimizer.compute_full_param_layout(
            params, bucket_size, data_ranks, ddp, expert_data_parallel_world_size=expert_data_ranks
        )
    return params, full.layouts


def stage_buffers(
    p: ModelPreset,
    *,
    world_size: int,
    tp: int,
    pp: int,
    ep: int,
    stage: int,
    bucket_size: int | None,
) -> dict[str, BufferSize]:
    """Buffers of a rank of pipeline stage ``stage``, bf16 parameters and fp32 gradients.

    Args:
        p: the model.
        world_size: ranks.
        tp: tensor-parallel size.
        pp: pipeline stages.
        ep: expert-parallel size, at least 2 (with 1 experts sit among the dense parameters).
        stage: counted from 0.
        bucket_size: see ``whole_matrix_layout``.

    Returns:
        ``dense`` and ``expert``.
    """
    chunk = split_into_chunks(p.num_layers, pp)[stage]
    weights = rank_weights(
        p,
        chunk.layers,
        tp=tp,
        ep=ep,
        has_embedding=chunk.has_embedding,
        has_head=chunk.has_head,
    )
    _, layouts = buffer_layouts(
        weights,
        data_ranks=world_size // (tp * pp),
        expert_data_ranks=world_size // (pp * ep),
        bucket_size=bucket_size,
        has_expert_parallel=ep > 1,
    )
    return {
        "expert" if key.is_expert_parallel else "dense": _size(layout)
        for key, layout in layouts.items()
    }


def _size(layout: object) -> BufferSize:
    index, buckets = layout.param_index_map, layout.bucket_indices  # type: ignore[attr-defined]
    num_shards = layout.num_optimizer_shards  # type: ignore[attr-defined]
    num_cut = 0
    for param, (start, end, bucket) in index.items():
        first, last = buckets[bucket]
        shard = (last - first) // num_shards
        num_cut += param.ndim >= 2 and (start - first) // shard != (end - 1 - first) // shard
    return BufferSize(sum(p.numel() for p in index), buckets[-1][1], num_cut)
