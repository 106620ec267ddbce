"""MuonClip's plan for a whole model at any world size, on one CPU and without a process group.

What a run plans on its ranks (``distributed.py``, ``domain.py``) is repeated here for each distinct
pipeline stage from shapes alone: Megatron's layout of ZeRO-1 buffers with our expert layout in it,
the cut of every matrix, the homes (``plan.make_plan``), and from them FLOPs and bytes of each rank.

Assumed, and our choice: layers are split evenly over the stages with the longer stages last, since
the first also holds the embedding. For K2 over 16 stages that is 3, 3, 3 and 13 times 4; the report
says 16 stages and not which layers. Buffers are cut into Megatron's default buckets, as with
``--overlap-grad-reduce``; context parallelism is part of data parallelism.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_k2.errors import UserError
from megatron_k2.optimizer.coefficients import coefficient_set
from megatron_k2.optimizer.gram_restarts import restart_segments
from megatron_k2.optimizer.padding import buffer_layouts, default_bucket_size
from megatron_k2.optimizer.plan import (
    Domain,
    Placement,
    make_plan,
    matrix_placements,
    shard_pieces,
)
from megatron_k2.optimizer.stage_plan import DomainPlan, StagePlan
from megatron_k2.planning.shapes import Weight, rank_weights, stage_layers
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class Layout:
    """Ranks of a run; expert tensor parallelism is 1."""

    world_size: int
    tp: int
    pp: int
    ep: int

    @property
    def data_ranks(self) -> int:
        """Data x context parallel."""
        return self.world_size // (self.tp * self.pp)

    @property
    def expert_data_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.pp * self.ep)


@dataclass(frozen=True)
class Role:
    """What Muon makes of a weight; the same as ``param_groups`` finds in a built model (tested)."""

    num_blocks: int = 1
    """Matrices stacked along the rows: 2 for a fused gate/up weight. 0: AdamW's."""
    partition_dim: int = -1
    """Dimension split over tensor-parallel ranks, -1 if whole."""


def check_plannable(p: ModelPreset, layout: Layout) -> None:
    """Refuse what cannot be laid out.

    Raises:
        UserError: naming the value and what it must be.
    """
    if min(layout.world_size, layout.tp, layout.pp, layout.ep) < 1:
        raise UserError(f"{layout}: every size is at least 1")
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


def weight_roles(
    p: ModelPreset, layers: range, *, ep: int, has_embedding: bool, has_head: bool
) -> list[Role]:
    """Role of every weight of a rank, in the order of ``rank_weights``."""
    adamw, whole, column, row = Role(0), Role(), Role(1, 0), Role(1, 1)
    swiglu = [Role(2, 0), row]
    query = [column] if p.q_lora_rank is None else [whole, column]
    latent_norms = [adamw] if p.q_lora_rank is None else [adamw, adamw]
    attention = [adamw, row, *query, whole, column, *latent_norms, adamw]
    found = [adamw] if has_embedding else []
    for layer in layers:
        found += attention
        if layer < p.num_dense_layers:
            found += swiglu
        else:
            found += [whole, *swiglu * (p.num_moe_experts // ep), *swiglu]
    return [*found, adamw, adamw] if has_head else found


def _first_and_numel(buffer: Any, bucket: int) -> tuple[int, int]:
    """Where a bucket begins in its buffer, and its elements, padding included."""
    first, last = buffer.bucket_indices[bucket]
    return first, last - first


def _plan_domain(
    buffer: Any,
    layout: Layout,
    members: list[tuple[Weight, Role]],
    seed: tuple[int, ...],
    *,
    is_expert: bool,
    segments: tuple[int, ...],
) -> DomainPlan:
    """Cut, place and cost one buffer; ``members`` in its order, ``seed`` FLOPs a domain rank."""
    data_ranks = layout.expert_data_ranks if is_expert else layout.data_ranks
    domain = Domain(tensor_ranks=1 if is_expert else layout.tp, data_ranks=data_ranks)
    placements: list[Placement] = []
    for (weight, role), (start, end, bucket) in zip(
        members, buffer.param_index_map.values(), strict=True
    ):
        if role.num_blocks:
            pieces = shard_pieces(start, end, *_first_and_numel(buffer, bucket), data_ranks)
            rows, cols = weight.shape
            template = Placement("", (rows, cols), pieces, role.partition_dim, bucket)
            placements += matrix_placements(
                template, role.num_blocks, is_listed=False, tensor_ranks=domain.tensor_ranks
            )
    return DomainPlan(
        kind="expert" if is_expert else "dense",
        domain=domain,
        num_copies=layout.ep if is_expert else 1,
        placements=tuple(placements),
        plan=make_plan(placements, domain, segments, seed),
        seed=seed,
        segments=segments,
        parameters=sum(param.numel() for param in buffer.param_index_map),
        padded=buffer.bucket_indices[-1][1],
    )


def _plan_stage(
    p: ModelPreset, layout: Layout, stages: tuple[int, ...], layers: range
) -> StagePlan:
    """Experts first; the dense plan starts from their loads, as ``muonclip`` does it."""
    ends = {"has_embedding": 0 in stages, "has_head": layout.pp - 1 in stages}
    weights = rank_weights(p, layers, tp=layout.tp, ep=layout.ep, **ends)
    roles = weight_roles(p, layers, ep=layout.ep, **ends)
    params, buffers = buffer_layouts(
        weights,
        data_ranks=layout.data_ranks,
        expert_data_ranks=layout.expert_data_ranks,
        bucket_size=default_bucket_size(layout.data_ranks),
        has_expert_parallel=layout.ep > 1,
    )
    numbers = {param: number for number, param in enumerate(params)}
    num_ranks = layout.tp * layout.data_ranks
    loads = (0,) * num_ranks
    # A preset's flags: --muon-coefficient-type simple, --muonclip-dtype bf16.
    jordan = coefficient_set("jordan").take(p.training.muon_ns_steps)
    segments = restart_segments(jordan, torch.bfloat16)
    domains = []
    for key in sorted(buffers, key=lambda key: not key.is_expert_parallel):
        is_expert = key.is_expert_parallel
        order = [numbers[param] for param in buffers[key].param_index_map]
        found = _plan_domain(
            buffers[key],
            layout,
            [(weights[number], roles[number]) for number in order],
            (0,) * layout.expert_data_ranks if is_expert else loads,
            is_expert=is_expert,
            segments=segments,
        )
        domains.append(found)
        loads = found.plan.loads
        if is_expert:  # Megatron's order is tensor, expert, data: EP neighbours share a data rank
            loads = tuple(loads[rank // layout.ep] for rank in range(num_ranks))
    return StagePlan(stages, len(layers), **ends, domains=tuple(domains), loads=loads)


def plan_model(p: ModelPreset, layout: Layout) -> list[StagePlan]:
    """The plan of every rank, stages alike together.

    Raises:
        UserError: if the model cannot be laid out so.
    """
    check_plannable(p, layout)
    alike: dict[tuple[int, int, bool, bool], list[int]] = {}
    split = stage_layers(p.num_layers, layout.pp)
    for stage, layers in enumerate(split):
        num_dense = sum(layer < p.num_dense_layers for layer in layers)
        key = (len(layers), num_dense, stage == 0, stage == layout.pp - 1)
        alike.setdefault(key, []).append(stage)
    return [_plan_stage(p, layout, tuple(same), split[same[0]]) for same in alike.values()]
