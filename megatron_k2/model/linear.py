"""A linear layer whose weight is whole on every tensor-parallel rank."""

from collections.abc import Callable
from typing import Any, override

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class ReplicatedLinear(torch.nn.Module):
    """``x Wᵀ`` with W replicated over the tensor-parallel group, for MLA's down-projections.

    Under sequence parallelism each rank multiplies its own tokens; the weight is marked so that
    Megatron sums its gradient over the group. Without it every rank sees all tokens, and the
    gradient reaching the output must already be the whole one.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
    ) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[s, b, input] -> ([s, b, output], no bias)."""
        return F.linear(x, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Replicated in every tensor-parallel rank."""
        del metadata
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight}, prefix, {}, sharded_offsets
        )
