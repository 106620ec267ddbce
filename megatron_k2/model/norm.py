"""RMSNorm for the local path that works with sequence parallelism."""

from typing import override

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """``x / rms(x) * weight`` over the last dimension.

    Megatron's local norm refuses sequence parallelism ("sequence parallel not supported by torch
    LayerNorm"), which MoE with tensor parallelism demands. Under it each rank sees a part of the
    tokens, so the weight's gradient must be summed over the tensor-parallel group; Megatron does
    that for parameters marked ``sequence_parallel``.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: object
    ) -> None:
        super().__init__()
        del _unused
        self.hidden_size = hidden_size
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype; statistics in fp32."""
        return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
