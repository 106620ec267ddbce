"""RMSNorm for the local path that works with sequence parallelism."""

from typing import Any, override

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class _CpuRMSNorm(torch.autograd.Function):
    """The norm and its gradient in half the passes over memory.

    torch's own is one kernel on CUDA, but on a CPU a chain of elementwise operations with a
    backward pass each: [2048, 128] in fp32, both directions, 1.9 ms against 0.9 ms here.
    With x̂ = x / rms(x) and y = x̂ w: dx = (dy w − x̂ mean(dy w x̂)) / rms(x), dw = Σ dy x̂.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normalised = x * inverse_rms
        ctx.save_for_backward(normalised, weight, inverse_rms)
        return normalised * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        normalised, weight, inverse_rms = ctx.saved_tensors
        product = grad * normalised
        mean = torch.matmul(product, weight).div_(weight.numel()).unsqueeze(-1)
        grad_x = (grad * weight).sub_(normalised * mean).mul_(inverse_rms)
        return grad_x, product.flatten(0, -2).sum(0), None


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
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and x.dtype.itemsize >= 4:
            return _CpuRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
