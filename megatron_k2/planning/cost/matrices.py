"""Which weights are Muon's matrices, and how many matrices each holds: by arithmetic, no torch.

What ``optimizer/param_groups.py`` finds in a built model (tested against one).
"""

from collections import Counter
from dataclasses import dataclass

from megatron_k2.planning.cost.shapes import rank_weights
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class Role:
    """What Muon makes of one weight."""

    num_blocks: int = 1
    """Matrices stacked along the rows: 2 for a fused gate/up weight. 0: AdamW's."""
    partition_dim: int = -1
    """Dimension split over tensor-parallel ranks, -1 if whole."""


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


def matrix_shapes(p: ModelPreset) -> Counter[tuple[int, int]]:
    """[rows, cols] of Muon's whole matrices in all of the model, and how many there are of each."""
    ends = {"has_embedding": True, "has_head": True}
    layers = range(p.num_layers)
    weights = rank_weights(p, layers, tp=1, ep=1, **ends)
    roles = weight_roles(p, layers, ep=1, **ends)
    found: Counter[tuple[int, int]] = Counter()
    for weight, role in zip(weights, roles, strict=True):
        if role.num_blocks:
            rows, cols = weight.shape
            found[rows // role.num_blocks, cols] += role.num_blocks
    return found
