"""One rank's ZeRO-1 buffers as Megatron lays them out, padding included, without a model.

Megatron's own layout function, with our expert layout in it, runs on ``meta`` parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_k2.optimizer.sharded.expert_layout import expert_layout
from megatron_k2.planning.cost.shapes import Weight


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
