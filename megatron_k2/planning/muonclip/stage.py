"""What one pipeline stage's plan amounts to: FLOPs, balance and bytes of its ranks.

Pure arithmetic on a ``homes.Assignment``; ``model`` makes them for a whole model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_k2.optimizer.offload.choice import chosen_for_host
from megatron_k2.optimizer.sharded.homes import (
    Assignment,
    Placement,
    RankGrid,
    holders,
    sends,
)
from megatron_k2.planning.cost.memory import EXCHANGE_BYTES, GRADIENT_BYTES, WEIGHT_BYTES

ZERO1_BYTES = GRADIENT_BYTES + WEIGHT_BYTES
"""An element in ZeRO-1: fp32 gradients reduced and scattered, bf16 parameters gathered."""


@dataclass(frozen=True)
class Traffic:
    """Bytes each rank sends and receives in a step; what stays at home is not counted."""

    sent_out: tuple[int, ...]
    """Pieces of matrices, to their homes."""
    received_out: tuple[int, ...]
    sent_back: tuple[int, ...]
    """Parts of the results, to whoever holds them."""
    received_back: tuple[int, ...]


@dataclass(frozen=True)
class GroupPlan:
    """One matrix group of one stage."""

    kind: str
    """Whose matrices they are: ``dense`` ones or those of an ``expert``."""
    grid: RankGrid
    num_copies: int
    """Groups alike in the stage: one of dense matrices, EP of experts."""
    placements: tuple[Placement, ...]
    assignment: Assignment
    seed: tuple[int, ...]
    """FLOPs of each rank before this group's; they are in ``assignment.loads``."""
    costs: tuple[int, ...]
    """FLOPs of orthogonalising each of ``placements``."""
    parameters: int
    """Elements a tensor-parallel rank's buffers hold for ZeRO-1 to share, AdamW's included."""
    padded: int
    states: tuple[tuple[int, ...], ...]
    """Bytes of every shard's optimizer states, by data-parallel rank, in the buffers' order."""

    def state_bytes(self, offload: float) -> list[tuple[int, int]]:
        """(on the device, on the host) of each data-parallel rank, a part ``offload`` moved."""
        found = []
        for shards in self.states:
            chosen = chosen_for_host(shards, offload)
            on_host = sum(size for size, goes in zip(shards, chosen, strict=True) if goes)
            found.append((sum(shards) - on_host, on_host))
        return found

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """FLOPs of each rank from this group alone."""
        return tuple(
            load - seed for load, seed in zip(self.assignment.loads, self.seed, strict=True)
        )

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes exchanged in one optimizer step, by rank of the group."""
        return exchange_traffic(self.placements, self.grid, self.assignment.homes)

    @property
    def num_matrices(self) -> int:
        """Matrices of one such group."""
        return len(self.placements)

    @property
    def mean_load(self) -> float:
        """FLOPs a rank, were they spread evenly."""
        return sum(self.loads) / self.grid.size

    @property
    def largest_item(self) -> int:
        """FLOPs of the costliest matrix."""
        return max(self.costs, default=0)

    @property
    def imbalance(self) -> float:
        """Largest load over the larger of the mean and the largest item; 1 cannot be beaten."""
        bound = max(self.mean_load, self.largest_item)
        return max(self.loads) / bound if bound else 1.0

    @property
    def zero1_bytes(self) -> int:
        """Bytes a rank sends in ZeRO-1's reduce-scatter and all-gather (a ring), each step."""
        num_shards = self.grid.data_ranks
        return ZERO1_BYTES * self.padded * (num_shards - 1) // num_shards

    def summary(self) -> dict[str, Any]:
        """What ``plan optimizer --json`` prints of a group; FLOPs and bytes a rank and step."""
        mean, largest = self.mean_load, max(self.loads)
        return {
            "kind": self.kind,
            "tensor_ranks": self.grid.tensor_ranks,
            "data_ranks": self.grid.data_ranks,
            "groups": self.num_copies,
            "matrices": self.num_matrices,
            "flops_total": sum(self.loads),
            "flops_mean": mean,
            "flops_max": largest,
            "flops_largest_item": self.largest_item,
            "max_over_mean": largest / mean if mean else 1.0,
            "max_over_item_bound": self.imbalance,
            "padding": self.padded / self.parameters if self.parameters else 1.0,
            "exchange_out_mean_bytes": sum(self.traffic.sent_out) / self.grid.size,
            "exchange_out_max_bytes": max(self.traffic.sent_out + self.traffic.received_out),
            "exchange_back_mean_bytes": sum(self.traffic.sent_back) / self.grid.size,
            "exchange_back_max_bytes": max(self.traffic.sent_back + self.traffic.received_back),
            "zero1_bytes": self.zero1_bytes,
        }


@dataclass(frozen=True)
class StagePlan:
    """Pipeline stages with the same plan."""

    stages: tuple[int, ...]
    num_layers: int
    has_embedding: bool
    has_head: bool
    groups: tuple[GroupPlan, ...]
    """Experts first, as they are planned."""
    loads: tuple[int, ...]
    """FLOPs of each rank of the stage, both groups together."""

    @property
    def num_matrices(self) -> int:
        """Matrices of one such stage."""
        return sum(group.num_matrices * group.num_copies for group in self.groups)

    def summary(self) -> dict[str, Any]:
        """What ``plan optimizer --json`` prints of the stages; FLOPs a rank and step."""
        mean, largest = sum(self.loads) / len(self.loads), max(self.loads)
        return {
            "stages": list(self.stages),
            "layers": self.num_layers,
            "embedding": self.has_embedding,
            "head": self.has_head,
            "groups": [group.summary() for group in self.groups],
            "flops_mean": mean,
            "flops_max": largest,
            "flops_floor": self.floor,
            "max_over_mean": largest / mean if mean else 1.0,
            "max_over_floor": largest / self.floor if self.floor else 1.0,
        }

    @property
    def floor(self) -> float:
        """FLOPs that some rank has under any plan that leaves experts where they lie.

        The mean, or the costliest dense matrix on top of the experts of the idlest rank.
        """
        mean = sum(self.loads) / len(self.loads)
        last = self.groups[-1]
        return max(mean, min(last.seed) + last.largest_item)


def exchange_traffic(
    placements: Sequence[Placement], grid: RankGrid, homes: Sequence[int]
) -> Traffic:
    """Bytes on the wire of one step: to the homes once a piece, back to every holder."""
    sent_out, received_out, sent_back, received_back = ([0] * grid.size for _ in range(4))
    for placement, home in zip(placements, homes, strict=True):
        for rank in holders(placement, grid):
            if rank == home:
                continue
            start, end = placement.pieces[grid.coordinates(rank)[0]]
            size = EXCHANGE_BYTES * (end - start)
            if sends(placement, grid, home, rank):
                sent_out[rank] += size
                received_out[home] += size
            sent_back[home] += size
            received_back[rank] += size
    return Traffic(tuple(sent_out), tuple(received_out), tuple(sent_back), tuple(received_back))
