"""Which parameter is a Muon matrix, and which goes to AdamW: decided by module, never by name.

Muon (Moonlight, arXiv:2502.16982, section 2.2; the K2 report adds nothing): every matrix of a
hidden layer: attention projections, dense, shared and routed experts, the router. AdamW: input
embedding, output head, everything of fewer than two dimensions. A fused gate/up weight is two
matrices; each expert is its own. q_up and kv_up are orthogonalised whole (not stated for K2).
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from megatron_k2.model.linear import ReplicatedLinear

MATRIX_MODULES = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, Router)


@dataclass(frozen=True)
class MatrixSpec:
    """How a 2-D parameter is laid out on this rank."""

    num_blocks: int
    """Matrices stacked along the rows: 2 for a fused gate/up weight, else 1."""
    partition_dim: int
    """Dimension split over the tensor-parallel group, or -1 if whole."""
    is_expert: bool
    """Split over the expert-tensor-parallel group instead."""

    def assemble(self, shards: list[Tensor]) -> list[Tensor]:
        """Tensor-parallel shards [rows, cols] -> the whole matrices.

        A column-parallel fused weight holds [gate_r; up_r] on rank r.
        """
        if len(shards) == 1:
            return list(shards[0].chunk(self.num_blocks))
        dim = max(self.partition_dim, 0)
        blocks = zip(*(shard.chunk(self.num_blocks) for shard in shards), strict=True)
        return [torch.cat(parts, dim=dim) for parts in blocks]

    def own_part(self, matrices: list[Tensor], rank: int, size: int) -> Tensor:
        """Inverse of ``assemble`` for the shard of ``rank``."""
        if self.partition_dim < 0 or size == 1:
            return torch.cat(matrices) if len(matrices) > 1 else matrices[0]
        return torch.cat([m.chunk(size, dim=self.partition_dim)[rank] for m in matrices])


def _weights(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.ndim == 2]


def muon_matrices(model_chunks: list[torch.nn.Module]) -> dict[torch.nn.Parameter, MatrixSpec]:
    """Every Muon parameter of this rank.

    Raises:
        ValueError: for a matrix in a module whose layout is not known here.
    """
    fused: set[int] = set()
    known: dict[torch.nn.Parameter, MatrixSpec] = {}
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, MLP) and module.config.gated_linear_unit:
                fused.update(id(p) for p in _weights(module.linear_fc1))
        for name, module in chunk.named_modules():
            for param in _weights(module):
                if getattr(param, "is_embedding_or_output_parameter", False):
                    continue
                if not isinstance(module, MATRIX_MODULES):
                    raise ValueError(
                        f"{name}: a {tuple(param.shape)} matrix in {type(module).__name__}, which "
                        "MuonClip does not know; add its layout to optimizer/param_groups.py"
                    )
                is_split = getattr(param, "tensor_model_parallel", False)
                known[param] = MatrixSpec(
                    num_blocks=2 if id(param) in fused else 1,
                    partition_dim=getattr(param, "partition_dim", -1) if is_split else -1,
                    is_expert=bool(getattr(module, "is_expert", False)),
                )
    return known
