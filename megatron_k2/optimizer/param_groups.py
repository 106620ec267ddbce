"""Which parameter is a Muon matrix, and which goes to AdamW: decided by module, never by name.

Muon (Moonlight, arXiv:2502.16982, section 2.2; the K2 report adds nothing): every matrix of a
hidden layer: attention projections, dense, shared and routed experts, the router. AdamW: input
embedding, output head, everything of fewer than two dimensions. A fused gate/up weight is two
matrices; each expert is its own, also where experts are stored together as [e, rows, cols]. Of an
adapter A and B are matrices of their own, gate's and up's parts apart: their whitened updates have
the RMS of any other's, so that the product's grows with both. What is frozen is nobody's.

Where the report is silent there is a switch (``MatrixOptions``). The defaults, q_up and kv_up
orthogonalised whole and the router by Muon, are our reading of it and not stated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from megatron_k2.model.linear import ReplicatedLinear
from megatron_k2.model.lora.adapter import LowRankAdapter

MATRIX_MODULES = (
    *(ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, Router),
    LowRankAdapter,
)
TE_MATRIX_MODULES = frozenset({"TELinear", "TELayerNormColumnParallelLinear"})
"""Transformer Engine's, by class name of any base: they exist only where it is installed."""
TE_GROUPED_MODULE = "TEGroupedLinear"
"""Experts of a layer in one module: ``weight0`` to ``weightN``, or one [e, rows, cols]."""


@dataclass(frozen=True)
class MatrixOptions:
    """How matrices are taken where neither K2's nor Moonlight's report settles it."""

    is_per_head: bool = False
    """Orthogonalise each head's rows of q_up and kv_up on their own (GLM-5, Kimi K3)."""
    is_router_muon: bool = True


K2_OPTIONS = MatrixOptions()
"""What we take Kimi K2 to have done."""


@dataclass(frozen=True)
class MatrixSpec:
    """How a parameter is laid out on this rank; [e, rows, cols] counts as [e * rows, cols]."""

    num_blocks: int
    """Matrices, or parts of them, stacked along the rows: 2 for a fused gate/up weight."""
    partition_dim: int
    """Dimension of a matrix split over the tensor-parallel group, or -1 if whole."""
    is_expert: bool
    """Split over the expert-tensor-parallel group instead."""
    has_whole_blocks: bool = False
    """A block is a whole matrix (a head), and the ranks' blocks follow one another; otherwise the
    same block of every rank makes up one matrix."""


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """[rows, cols] of a parameter, the experts of [e, rows, cols] stacked along the rows."""
    return shape[:-1].numel(), shape[-1]


def _bases(module: torch.nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}


def _weights(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [
        p
        for p in module.parameters(recurse=False)
        if p.ndim >= 2
        and p.requires_grad
        and not getattr(p, "is_embedding_or_output_parameter", False)
    ]


def _gate_ups(modules: list[torch.nn.Module]) -> set[int]:
    """Ids of the weights that hold a gate above an up projection."""
    fused: set[int] = set()
    for module in modules:
        config: Any = getattr(module, "config", None)
        up: Any = getattr(module, "linear_fc1", None)
        if up is None or not getattr(config, "gated_linear_unit", False):
            continue
        for name in ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"):
            if getattr(config, name, None):
                raise ValueError(f"MuonClip needs the gate above the up projection; unset {name}")
        fused.update(id(p) for p in _weights(up))
    return fused


def _head_rows(modules: list[torch.nn.Module]) -> dict[int, int]:
    """Id of each weight whose rows are heads -> rows of one head."""
    rows: dict[int, int] = {}
    for module in modules:
        if isinstance(module, MultiLatentAttention):
            config: Any = module.config
            has_latent = config.q_lora_rank is not None
            query = module.linear_q_up_proj if has_latent else module.linear_q_proj
            rows[id(query.weight)] = config.qk_head_dim + config.qk_pos_emb_head_dim
            key_value = module.linear_kv_up_proj.weight
            rows[id(key_value)] = config.qk_head_dim + config.v_head_dim
    return rows


def _check_known(name: str, module: torch.nn.Module, param: torch.nn.Parameter) -> None:
    bases = _bases(module)
    is_grouped = TE_GROUPED_MODULE in bases
    is_known = isinstance(module, MATRIX_MODULES) or bool(bases & TE_MATRIX_MODULES)
    if not (is_grouped or (is_known and param.ndim == 2)) or param.ndim > 3:
        raise ValueError(
            f"{name}: a {tuple(param.shape)} matrix in {type(module).__name__}, which "
            "MuonClip does not know; add its layout to optimizer/param_groups.py"
        )


def _classified(
    chunk: torch.nn.Module, options: MatrixOptions
) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter, MatrixSpec]]:
    """(module's name, module, Muon parameter, its layout)."""
    modules = list(chunk.modules())
    fused = _gate_ups(modules)
    head_rows = _head_rows(modules) if options.is_per_head else {}
    for name, module in chunk.named_modules():
        if isinstance(module, Router) and not options.is_router_muon:
            continue
        is_grouped = TE_GROUPED_MODULE in _bases(module)
        for param in _weights(module):
            _check_known(name, module, param)
            num_blocks = 2 if id(param) in fused else 1
            if isinstance(module, LowRankAdapter):
                num_blocks = module.num_matrices_in(param)
            if param.ndim == 3:
                num_blocks *= param.shape[0]
            if id(param) in head_rows:
                num_blocks = param.shape[0] // head_rows[id(param)]
            is_split = getattr(param, "tensor_model_parallel", False)
            # Upstream's partition_dim is that of one expert's matrix, also for [e, rows, cols]
            # (extensions/transformer_engine.py:_set_expert_parameter_attributes).
            yield (
                name,
                module,
                param,
                MatrixSpec(
                    num_blocks=num_blocks,
                    partition_dim=getattr(param, "partition_dim", -1) if is_split else -1,
                    is_expert=is_grouped or bool(getattr(module, "is_expert", False)),
                    has_whole_blocks=id(param) in head_rows,
                ),
            )


def muon_matrices(
    model_chunks: list[torch.nn.Module], options: MatrixOptions = K2_OPTIONS
) -> dict[torch.nn.Parameter, MatrixSpec]:
    """Every Muon parameter of this rank.

    Raises:
        ValueError: for a matrix in a module whose layout is not known here.
    """
    return {
        param: spec for chunk in model_chunks for _, _, param, spec in _classified(chunk, options)
    }
