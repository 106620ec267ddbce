"""Buffers of ZeRO-1: hardly padded at K2's size, and no expert matrix cut where that can be.

Layouts are those of the table in the design notes: 256 to 2048 ranks. The oracle of a layout is its
definition: no two parameters overlap, each is as long as it is, every rule of Megatron's file.
"""

import contextlib
import itertools

import pytest
import torch

from megatron_k2.optimizer.sharded.bucket_size import default_bucket_size
from megatron_k2.optimizer.sharded.expert_layout import (
    expert_layout,
    whole_matrix_layout,
)
from megatron_k2.planning.cost.shapes import rank_weights
from megatron_k2.planning.muonclip import buffers
from megatron_k2.planning.schedule.chunks import split_into_chunks
from megatron_k2.presets import KIMI_K2

K2_LAYOUTS = {
    "256 TP1 EP16": (256, 1, 16),
    "512 TP2 EP32": (512, 2, 32),
    "1024 TP8 EP64": (1024, 8, 64),
    "2048 TP8 EP128": (2048, 8, 128),
    "2048 TP1 EP64": (2048, 1, 64),
    "2048 TP1 EP16": (2048, 1, 16),
}
STAGES = {"embedding, dense layer": 0, "three layers": 1, "middle": 7, "head": 15}


def _stage_buffers(layout, stage, bucket_size):
    """Of a rank: kind -> (padded over parameters, matrices on more than one data-parallel rank)."""
    world_size, tp, ep = K2_LAYOUTS[layout]
    chunk = split_into_chunks(KIMI_K2.num_layers, 16)[stage]
    ends = {"has_embedding": chunk.has_embedding, "has_head": chunk.has_head}
    _, layouts = buffers.buffer_layouts(
        rank_weights(KIMI_K2, chunk.layers, tp=tp, ep=ep, **ends),
        data_ranks=world_size // (tp * 16),
        expert_data_ranks=world_size // (16 * ep),
        bucket_size=bucket_size,
        has_expert_parallel=True,
    )
    found = {}
    for key, buffer in layouts.items():
        num_cut = 0
        for param, (start, end, bucket) in buffer.param_index_map.items():
            first, last = buffer.bucket_indices[bucket]
            shard = (last - first) // buffer.num_optimizer_shards
            num_cut += param.ndim >= 2 and (start - first) // shard != (end - 1 - first) // shard
        padded, numel = buffer.bucket_indices[-1][1], sum(p.numel() for p in buffer.param_index_map)
        found["expert" if key.is_expert_parallel else "dense"] = (padded / numel, num_cut)
    return found


@pytest.mark.parametrize("has_buckets", [False, True], ids=["one bucket", "buckets"])
@pytest.mark.parametrize("layout", K2_LAYOUTS)
def test_k2s_buffers_are_padded_by_less_than_a_thousandth(layout, has_buckets):
    world_size, tp, _ = K2_LAYOUTS[layout]
    bucket_size = default_bucket_size(world_size // (16 * tp)) if has_buckets else None
    for stage in STAGES.values():
        found = _stage_buffers(layout, stage, bucket_size)
        assert found.keys() == {"dense", "expert"}
        assert all(1 <= ratio <= 1.001 for ratio, _ in found.values())
        assert found["expert"][1] == 0, "24, 12, 6 or 3 experts over 1, 2 or 8 ranks"


def test_megatrons_own_layout_cuts_k2s_experts(monkeypatch):
    """The zero above is ours: 4 layers of 24 experts over 8 ranks in 40 M-element buckets."""
    monkeypatch.setattr(buffers, "expert_layout", contextlib.nullcontext)
    _, num_cut = _stage_buffers("2048 TP1 EP16", 7, default_bucket_size(128))["expert"]
    assert num_cut > 10


def _experts(num_layers, num_experts, rows=20, cols=48, is_grouped=False):
    """fc1 and fc2 of every expert, in the order of SequentialMLP or of grouped storage."""
    first, second = (2 * rows, cols), (cols, rows)
    layer = [first] * num_experts + [second] * num_experts
    shapes = layer if is_grouped else [first, second] * num_experts
    return [torch.nn.Parameter(torch.empty(s, device="meta")) for s in shapes * num_layers]


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("bucket_size", [None, 1, 6000, 10**9])
@pytest.mark.parametrize("num_shards", [2, 3, 4, 6])
@pytest.mark.parametrize("is_busbw", [False, True])
def test_every_rank_gets_whole_matrices_of_every_shape_alike(
    num_shards, bucket_size, is_grouped, is_busbw
):
    params = _experts(3, 12, rows=21, cols=47, is_grouped=is_grouped)  # no multiple of 64
    layout = whole_matrix_layout(params, bucket_size, num_shards, is_busbw, [])
    assert list(layout.param_index_map) == params[::-1]
    position = 0
    for bucket, (first, last) in enumerate(layout.bucket_indices):
        assert first == position
        position = last
        assert (last - first) % num_shards == 0
        assert (last - first) % (2**16 if is_busbw else 128) == 0
        shard = (last - first) // num_shards
        owned = [[] for _ in range(num_shards)]
        spans = []
        for param, (start, end, own_bucket) in layout.param_index_map.items():
            if own_bucket != bucket:
                continue
            assert end - start == param.numel()
            assert start % 64 == 0
            assert (start - first) // shard == (end - 1 - first) // shard
            owned[(start - first) // shard].append(tuple(param.shape))
            spans.append((start, end))
        assert all(sorted(run) == sorted(owned[0]) for run in owned)
        spans.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert first <= spans[0][0]
        assert spans[-1][1] <= last
        assert layout.per_bucket_numel_unpadded[bucket] == spans[-1][1] - first
    order = [bucket for _, _, bucket in layout.param_index_map.values()]
    assert order == sorted(order)
    if bucket_size == 1:
        assert len(layout.bucket_indices) > 3
    if bucket_size in (None, 10**9):
        assert len(layout.bucket_indices) == 1


def test_where_the_count_does_not_divide_there_is_no_such_layout():
    assert whole_matrix_layout(_experts(1, 4), None, 3, False, []) is None


def test_megatrons_function_is_back_in_place_afterwards():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    before = DistributedOptimizer.compute_full_param_layout
    with expert_layout():
        assert DistributedOptimizer.compute_full_param_layout is not before
    assert DistributedOptimizer.compute_full_param_layout is before
