"""How much larger than its parameters a ZeRO-1 buffer is, at any size, without building a model.

Megatron's own layout function, with our expert layout in it, runs on ``meta`` parameters.
"""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_k2.optimizer.expert_layout import expert_layout
from megatron_k2.planning.shapes import rank_weights, stage_layers
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


def default_bucket_size(data_ranks: int) -> int:
    """Elements; Megatron's, with ``--overlap-grad-reduce`` (training.py:1562)."""
    return max(40_000_000, 1_000_000 * data_ranks)


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
    weights = rank_weights(
        p,
        stage_layers(p.num_layers, pp)[stage],
        tp=tp,
        ep=ep,
        has_embedding=stage == 0,
        has_head=stage == pp - 1,
    )
    params = []
    for weight in weights:
        param = torch.nn.Parameter(torch.empty(weight.shape, device="meta", dtype=torch.bfloat16))
        param.allreduce = not weight.is_expert  # type: ignore[attr-defined]
        params.append(param)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, bucket_size=bucket_size
    )
    with expert_layout():
        full = DistributedOptimizer.compute_full_param_layout(
            params,
            bucket_size,
            world_size // (tp * pp),
            ddp,
            expert_data_parallel_world_size=world_size // (pp * ep),
        )
    return {
        "expert" if key.is_expert_parallel else "dense": _size(layout)
        for key, layout in full.layouts.items()
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
