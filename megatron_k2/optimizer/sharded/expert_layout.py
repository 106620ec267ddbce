"""ZeRO-1 shards of experts cut between matrices: then nothing of them is exchanged.

Megatron lays parameters into flat buckets and cuts each bucket into equal shards, one an
(expert-)data-parallel rank, wherever the cut falls. A rank's experts are identical in shape, so
where the expert-data-parallel size divides their number a bucket can be filled such that every cut
falls between two matrices: each rank then owns whole matrices, an equal share of every shape, and
orthogonalises them where they lie.

The seam is ``DistributedOptimizer.compute_full_param_layout``, which Megatron calls before wrapping
the model in DDP and whose result DDP "consumes without any optimizer-specific knowledge"
(core/optimizer/param_layout.py). ``expert_layout`` replaces it while entered. Every rule of that
file is kept: parameters in backward order over the buckets, starts at multiples of 64 elements,
ends padded by ``bucket_end_divisor``.
"""

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import (
    PerBufferParamLayout,
    bucket_end_divisor,
    pad_param_start,
    pad_to_divisor,
)

from megatron_k2.host.repairs import require_checked_megatron

START_ALIGNMENT = 64
"""Elements; what ``pad_param_start`` aligns to."""


def whole_matrix_layout(
    params: Sequence[torch.nn.Parameter],
    bucket_size: int | None,
    num_shards: int,
    pad_for_high_nccl_busbw: bool,
    param_indices: list[int],
) -> PerBufferParamLayout | None:
    """A layout whose shard cuts all lie between parameters, or ``None`` where there is none.

    Args:
        params: of one buffer, in the model's order.
        bucket_size: elements after which a bucket is closed, at the next point where the shards
            come out alike; ``None`` for one bucket.
        num_shards: ranks that share the buffer.
        pad_for_high_nccl_busbw: of the DDP configuration.
        param_indices: passed on.
    """
    groups = _even_buckets(params[::-1], bucket_size, num_shards)
    if groups is None:
        return None
    divisor = bucket_end_divisor(num_shards, pad_for_high_nccl_busbw)
    alignment = math.lcm(START_ALIGNMENT, divisor // num_shards)
    layout = PerBufferParamLayout(param_indices=param_indices, num_optimizer_shards=num_shards)
    start = 0
    for bucket, members in enumerate(groups):
        runs = _shards(members, num_shards)
        # Runs are alike up to their order, and starts are aligned, so that this is no maximum.
        length = pad_to_divisor(max(_place(run, 0)[1] for run in runs), alignment)
        where: dict[torch.nn.Parameter, tuple[int, int]] = {}
        for shard, run in enumerate(runs):
            where |= _place(run, start + shard * length)[0]
        layout.param_index_map |= {param: (*where[param], bucket) for param in members}
        layout.per_bucket_numel_unpadded.append(max(end for _, end in where.values()) - start)
        layout.bucket_indices.append((start, start + num_shards * length))
        start += num_shards * length
    return layout


def _even_buckets(
    params: Sequence[torch.nn.Parameter], bucket_size: int | None, num_shards: int
) -> list[list[torch.nn.Parameter]] | None:
    """Consecutive runs of at least ``bucket_size``, each with a multiple of every shape."""
    buckets: list[list[torch.nn.Parameter]] = [[]]
    shapes: Counter[torch.Size] = Counter()
    numel = 0
    for param in params:
        is_even = all(count % num_shards == 0 for count in shapes.values())
        if bucket_size is not None and numel >= bucket_size and is_even:
            buckets.append([])
            shapes.clear()
            numel = 0
        buckets[-1].append(param)
        shapes[param.shape] += 1
        numel += param.numel()
    return buckets if all(count % num_shards == 0 for count in shapes.values()) else None


def _shards(members: list[torch.nn.Parameter], num_shards: int) -> list[list[torch.nn.Parameter]]:
    """The bucket's parameters dealt out: of each shape, the first part to the first shard."""
    by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
    for param in members:
        by_shape[param.shape].append(param)
    runs: list[list[torch.nn.Parameter]] = [[] for _ in range(num_shards)]
    for same in by_shape.values():
        share = len(same) // num_shards
        for shard, run in enumerate(runs):
            run.extend(same[shard * share : (shard + 1) * share])
    return runs


def _place(
    run: list[torch.nn.Parameter], start: int
) -> tuple[dict[torch.nn.Parameter, tuple[int, int]], int]:
    """([start, end) of each parameter, end of the last) when laid one after another."""
    where = {}
    position = start
    for param in run:
        position = pad_param_start(position)
        where[param] = (position, position + param.numel())
        position += param.numel()
    return where, position


@contextlib.contextmanager
def expert_layout() -> Iterator[None]:
    """Lay expert buffers out by ``whole_matrix_layout`` where it can, all else as Megatron does."""
    require_checked_megatron()
    original = DistributedOptimizer.compute_full_param_layout

    def compute(
        params: list[torch.nn.Parameter],
        bucket_size: int | None,
        data_parallel_world_size: int,
        ddp_config: Any,
        expert_data_parallel_world_size: int | None = None,
    ) -> Any:
        full = original(
            params,
            bucket_size,
            data_parallel_world_size,
            ddp_config,
            expert_data_parallel_world_size=expert_data_parallel_world_size,
        )
        for key, layout in full.layouts.items():
            num_shards = layout.num_optimizer_shards
            if not key.is_expert_parallel or num_shards == 1:
                continue
            members = list(layout.param_index_map)[::-1]
            even = whole_matrix_layout(
                members,
                bucket_size,
                num_shards,
                ddp_config.pad_buckets_for_high_nccl_busbw,
                layout.param_indices,
            )
            if even is not None:
                full.layouts[key] = even
        return full

    DistributedOptimizer.compute_full_param_layout = staticmethod(compute)
    try:
        yield
    finally:
        DistributedOptimizer.compute_full_param_layout = staticmethod(original)
