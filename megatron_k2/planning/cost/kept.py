"""One tensor that autograd keeps for the backward pass, and who recomputes or offloads it."""

from dataclasses import dataclass
from typing import Literal

from megatron_k2.planning.request import Recompute

OffloadModule = Literal["attn_norm", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]
"""Megatron's ``--offload-modules``, in the order of the forward."""


@dataclass(frozen=True)
class Kept:
    """One tensor held for the backward pass."""

    name: str
    bytes_per_token: float
    recompute: Recompute | None = None
    """Dropped when this is recomputed."""
    instead_of: Recompute | None = None
    """Kept only when this is recomputed."""
    offload: OffloadModule | None = None
    """The module whose group takes it off the device, where it
    has a million elements."""
    copies_on_host: int = 1
    """Groups that hand over this tensor, each a copy of its own."""
    can_be_fp8: bool = False
    """Stored as FP8 tiles when that is on: inputs of the experts' up-projection and of SwiGLU."""
