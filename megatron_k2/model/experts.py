"""The routed experts of one rank, all in one grouped product rather than one after another.

``GroupedExperts`` is Megatron's ``SequentialMLP`` with another forward: the same parameters (a
weight for each expert and projection), the same checkpoint keys, the same communication, which for
experts is the dispatcher's. What differs is that K2's 384 experts of width 2048 cost two products,
one SwiGLU and three autograd nodes a layer and micro-batch in place of thousands, and that nothing
waits for the token counts: they stay on the device. ``--recompute-modules moe_act`` (with
``--moe-grouped-gemm``, on which Megatron insists) keeps the SwiGLU's input and not its output.
"""

from typing import Any, override

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_k2.errors import UserError


class _GroupedLinear(torch.autograd.Function):
    """``y[i] = x[i] W_eᵀ`` for the rows i of each expert e."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        # Of frozen weights the input is not kept: nothing is computed from it.
        kept = x if any(ctx.needs_input_grad[2:]) else None
        ctx.save_for_backward(kept, ends, *weights)
        return F.grouped_mm(x, torch.stack(weights).mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Stacked again rather than kept: a copy of a layer's experts is too much to hold.
            grad_x = F.grouped_mm(grad, torch.stack(weights), offs=ends)
        if x is None:
            return grad_x, None, *[None] * len(weights)
        return grad_x, None, *F.grouped_mm(grad.mT, x, offs=ends).unbind()


def grouped_linear(x: Tensor, tokens_per_expert: Tensor, weights: list[Tensor]) -> Tensor:
    """Multiply each expert's tokens by its own weight.

    Args:
        x: [tokens, in], sorted by expert.
        tokens_per_expert: [num experts] integer, their sum is the number of tokens. Zeros are fine:
            that expert's gradient is zero.
        weights: [out, in] each, one an expert, dtype of ``x``.

    Returns:
        [tokens, out], dtype of ``x``.
    """
    ends = tokens_per_expert.to(x.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    return _GroupedLinear.apply(x, ends, *weights)


class _WeightedSwiGLU(torch.autograd.Function):
    """``silu(gate) · up · p``; keeps [gate; up] and p for backward, and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, probs)
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate).mul_(up) * probs).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, probs = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        weighted = (grads[0] * probs).to(gate_up.dtype)
        torch.mul(weighted, activated, out=grad_up)
        grad_probs = (activated.mul_(up) * grads[0]).sum(-1, keepdim=True, dtype=probs.dtype)
        torch.ops.aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=grad_gate)
        return grad_gate_up, grad_probs


def weighted_swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """An expert's activation, times what the router gave the token.

    Args:
        gate_up: [tokens, 2 width], gate first.
        probs: [tokens], fp32 usually.

    Returns:
        [tokens, width], dtype of ``gate_up``; the product with ``probs`` is taken in theirs.
    """
    return _WeightedSwiGLU.apply(gate_up, probs.unsqueeze(-1))


class ColumnParallelWeight(ColumnParallelLinear):
    """One expert's gate and up projection, kept and initialised by Megatron, multiplied elsewhere.

    Calling it hands out its weight. It has to be called, not read: with
    ``--overlap-param-gather`` Megatron waits for a parameter in its module's forward pre-hook.
    """

    @override
    def forward(self) -> Tensor:  # type: ignore[override]
        """The weight of gate over up, [2 width, hidden]."""
        return self.weight


class RowParallelWeight(RowParallelLinear):
    """One expert's down projection; see ``ColumnParallelWeight`` for why it is called."""

    @override
    def forward(self) -> Tensor:  # type: ignore[override]
        """The weight of the down projection, [hidden, width]."""
        return self.weight


class GroupedExperts(SequentialMLP):
    """Megatron's local experts, computed together.

    Raises:
        ValueError: for experts other than a plain SwiGLU without bias, which is what K2's are, and
            for rows that are no multiple of 16 bytes, which the grouped product needs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, submodules=self.weight_modules(), **kwargs)
        config = self.config
        is_swiglu = config.gated_linear_unit and config.activation_func is F.silu
        is_plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
        if not (is_swiglu and is_plain) or config.add_bias_linear:
            raise ValueError("GroupedExperts computes SwiGLU without bias, clamp or offset only")
        if config.moe_apply_probs_on_input:
            raise ValueError(
                "GroupedExperts weights the activation and not the input: unset "
                "moe_apply_probs_on_input"
            )
        self._is_activation_recomputed = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        sizes = {"hidden_size": config.hidden_size, "ffn_hidden_size": config.ffn_hidden_size}
        multiple = 16 // config.params_dtype.itemsize
        for name, size in sizes.items():
            if size % multiple:
                raise UserError(
                    f"experts with {name}={size} in {config.params_dtype}: the grouped product "
                    f"needs rows of 16 bytes, a multiple of {multiple}"
                )

    @override
    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Outputs of this rank's experts for the tokens sent to it.

        Args:
            permuted_local_hidden_states: [tokens, hidden], sorted by expert.
            tokens_per_expert: [num local experts].
            permuted_probs: [tokens], the routing weights.

        Returns:
            ([tokens, hidden], no bias); under expert tensor parallelism a partial sum, which the
            dispatcher reduces.
        """
        up: list[Any] = [expert.linear_fc1 for expert in self.local_experts]
        down: list[Any] = [expert.linear_fc2 for expert in self.local_experts]
        gate_up = self.product(permuted_local_hidden_states, tokens_per_expert, up)
        if not self._is_activation_recomputed:
            activated = weighted_swiglu(gate_up, permuted_probs)
            return self.product(activated, tokens_per_expert, down), None
        checkpoint = CheckpointWithoutOutput(fp8=None)
        activated = checkpoint.checkpoint(weighted_swiglu, gate_up, permuted_probs)
        output = self.product(activated, tokens_per_expert, down)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    def weight_modules(self) -> MLPSubmodules:
        """Classes of one expert's two projections; called before the module is built."""
        return MLPSubmodules(linear_fc1=ColumnParallelWeight, linear_fc2=RowParallelWeight)

    def product(self, x: Tensor, tokens_per_expert: Tensor, linears: list[Any]) -> Tensor:
        """[tokens, in], sorted by expert -> [tokens, out], by each expert's own one of ``linears``.

        They are called for their weights, see ``ColumnParallelWeight``.
        """
        return grouped_linear(x, tokens_per_expert, [linear() for linear in linears])
