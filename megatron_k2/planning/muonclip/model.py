"""MuonClip's plan for a whole model at any world size, on one CPU and without a process group.

What a run plans on its ranks (``sharded/optimizer.py``, ``sharded/matrix_group.py``) is repeated
here for each distinct pipeline rank from shapes alone: Megatron's layout of ZeRO-1 buffers with our
expert layout in it, the cut of every matrix, the homes (``homes.assign_homes``), and from them the
FLOPs and bytes of each rank.

Layers are split over ranks and virtual stages as everywhere (``planning/schedule/chunks.py``).
Assumed: buffers are cut into Megatron's default buckets, as with ``--overlap-grad-reduce`` on the
first stage; context parallelism is part of data parallelism.
"""

from dataclasses import dataclass
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.optimizer.sharded.bucket_size import default_bucket_size
from megatron_k2.optimizer.sharded.homes import (
    Placement,
    RankGrid,
    assign_homes,
    matrix_placements,
    shard_pieces,
)
from megatron_k2.parallel.layout import Layout, check_degrees
from megatron_k2.planning.cost.flops import newton_schulz_segments
from megatron_k2.planning.cost.matrices import Role, weight_roles
from megatron_k2.planning.cost.memory import ADAMW_STATE_BYTES, MUON_STATE_BYTES
from megatron_k2.planning.cost.shapes import Weight, rank_weights
from megatron_k2.planning.muonclip.buffers import buffer_layouts
from megatron_k2.planning.muonclip.stage import GroupPlan, StagePlan
from megatron_k2.planning.schedule.chunks import Chunk, distinct_ranks, split_into_chunks
from megatron_k2.presets import ModelPreset


def check_plannable(p: ModelPreset, layout: Layout) -> None:
    """Refuse what cannot be laid out.

    Raises:
        UserError: naming the value and what it must be.
    """
    check_degrees(layout)
    if layout.pp > p.num_layers:
        raise UserError(f"--pp {layout.pp}: {p.name} has {p.num_layers} layers; at most that many")
    if layout.ep == 1 and layout.tp > 1:
        raise UserError(f"--ep 1 with --tp {layout.tp}: experts would be split; use --tp 1")
    per_stage = layout.pp * layout.tp, layout.pp * layout.ep
    for number, what, divisor, flag in (
        (layout.world_size, "--world-size", per_stage[0], "--tp x --pp"),
        (layout.world_size, "--world-size", per_stage[1], "--ep x --pp"),
        (p.num_moe_experts, "experts", layout.ep, "--ep"),
        (p.num_attention_heads, "attention heads", layout.tp, "--tp"),
        (p.moe_shared_expert_intermediate_size, "shared experts' width", layout.tp, "--tp"),
        (p.ffn_hidden_size, "dense layers' width", layout.tp, "--tp"),
        (p.vocab_size, "vocabulary", layout.tp, "--tp"),
    ):
        if number % divisor:
            raise UserError(f"{what} {number} does not divide by {flag} = {divisor}; change {flag}")


def _first_and_numel(buffer: Any, bucket: int) -> tuple[int, int]:
    """Where a bucket begins in its buffer, and its elements, padding included."""
    first, last = buffer.bucket_indices[bucket]
    return first, last - first


@dataclass(frozen=True)
class _Buffer:
    """One model chunk's parameters of one matrix group, as Megatron lays them out."""

    layout: Any
    members: list[tuple[Weight, Role]]
    """Each parameter's weight and role, in the order in which the buffer holds them."""


def _chunk_buffers(p: ModelPreset, layout: Layout, chunk: Chunk) -> dict[bool, _Buffer]:
    """Buffers of a chunk by whether they hold experts."""
    ends = {"has_embedding": chunk.has_embedding, "has_head": chunk.has_head}
    weights = rank_weights(p, chunk.layers, tp=layout.tp, ep=layout.ep, **ends)
    roles = weight_roles(p, chunk.layers, ep=layout.ep, **ends)
    params, layouts = buffer_layouts(
        weights,
        data_ranks=layout.data_ranks,
        expert_data_ranks=layout.expert_data_ranks,
        bucket_size=default_bucket_size(layout.data_ranks),
        has_expert_parallel=layout.ep > 1,
    )
    numbers = {param: number for number, param in enumerate(params)}
    found = {}
    for key, buffer in layouts.items():
        order = [numbers[param] for param in buffer.param_index_map]
        found[key.is_expert_parallel] = _Buffer(buffer, [(weights[n], roles[n]) for n in order])
    return found


def _plan_group(
    buffers: list[_Buffer],
    layout: Layout,
    seed: tuple[int, ...],
    *,
    is_expert: bool,
    segments: tuple[int, ...],
) -> GroupPlan:
    """Cut, place and cost a rank's buffers of one kind; ``seed`` is each rank's FLOPs before."""
    data_ranks = layout.expert_data_ranks if is_expert else layout.data_ranks
    grid = RankGrid(tensor_ranks=1 if is_expert else layout.tp, data_ranks=data_ranks)
    placements: list[Placement] = []
    states: list[list[int]] = [[] for _ in range(data_ranks)]
    first_bucket = 0
    for buffer in buffers:
        places = buffer.layout.param_index_map.values()
        for (weight, role), (start, end, bucket) in zip(buffer.members, places, strict=True):
            where = _first_and_numel(buffer.layout, bucket)
            pieces = shard_pieces(start, end, *where, data_ranks)
            element = MUON_STATE_BYTES if role.num_blocks else ADAMW_STATE_BYTES
            for shard, (low, high) in zip(states, pieces, strict=True):
                if high > low:
                    shard.append(element * (high - low))
            if role.num_blocks:
                rows, cols = weight.shape
                template = Placement(
                    "", (rows, cols), pieces, role.partition_dim, first_bucket + bucket
                )
                placements += matrix_placements(
                    template,
                    role.num_blocks,
                    has_whole_blocks=False,
                    tensor_ranks=grid.tensor_ranks,
                )
        first_bucket += len(buffer.layout.bucket_indices)
    flops = {p.shape: newton_schulz_flops(*p.shape, segments) for p in placements}
    costs = tuple(flops[placement.shape] for placement in placements)
    return GroupPlan(
        kind="expert" if is_expert else "dense",
        grid=grid,
        num_copies=layout.ep if is_expert else 1,
        placements=tuple(placements),
        assignment=assign_homes(placements, grid, costs, seed),
        seed=seed,
        costs=costs,
        parameters=sum(p.numel() for buffer in buffers for p in buffer.layout.param_index_map),
        padded=sum(buffer.layout.bucket_indices[-1][1] for buffer in buffers),
        states=tuple(map(tuple, states)),
    )


def plan_stage(
    p: ModelPreset, layout: Layout, stages: tuple[int, ...], chunks: tuple[Chunk, ...]
) -> StagePlan:
    """The plan of a pipeline rank that holds ``chunks``, and of all ``stages`` like it.

    Experts first; the dense plan starts from their loads, as ``muonclip`` does it.
    """
    buffers = [_chunk_buffers(p, layout, chunk) for chunk in chunks]
    num_ranks = layout.tp * layout.data_ranks
    loads = (0,) * num_ranks
    segments = newton_schulz_segments(p)
    groups = []
    for is_expert in (True, False):
        own = [by_kind[is_expert] for by_kind in buffers if is_expert in by_kind]
        if not own:
            continue
        seed = (0,) * layout.expert_data_ranks if is_expert else loads
        found = _plan_group(own, layout, seed, is_expert=is_expert, segments=segments)
        groups.append(found)
        loads = found.assignment.loads
        if is_expert:  # Megatron's order is tensor, expert, data: EP neighbours share a data rank
            loads = tuple(loads[rank // layout.ep] for rank in range(num_ranks))
    return StagePlan(
        stages,
        sum(len(chunk.layers) for chunk in chunks),
        has_embedding=any(chunk.has_embedding for chunk in chunks),
        has_head=any(chunk.has_head for chunk in chunks),
        groups=tuple(groups),
        loads=loads,
    )


def plan_model(p: ModelPreset, layout: Layout) -> list[StagePlan]:
    """The plan of every rank, stages alike together.

    Raises:
        UserError: if the model cannot be laid out so.
    """
    check_plannable(p, layout)
    chunks = split_into_chunks(p.num_layers, layout.pp, layout.vpp)
    return [
        plan_stage(p, layout, same, tuple(chunk for chunk in chunks if chunk.rank == rank))
        for rank, same in distinct_ranks(chunks, p.num_dense_layers).items()
    ]
