"""Megatron's linears with an adapter beside the frozen weight, for the local modules."""

from typing import Any, override

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_k2.model.experts import ColumnParallelWeight, RowParallelWeight
from megatron_k2.model.linear import ReplicatedLinear
from megatron_k2.model.lora.adapter import ADAPTER, ExpertAdapter, LowRankAdapter
from megatron_k2.model.lora.settings import LoraSettings


class _WithAdapter:
    """What every linear with an adapter does besides: describe it to a checkpoint."""

    adapter: LowRankAdapter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The linear's own, which takes an adapter for replicated, with the adapter's in place."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        at = f"{prefix}{ADAPTER}."
        return {**own, **self.adapter.sharded_state_dict(at, sharded_offsets, metadata)}


class AdaptedColumnParallelLinear(_WithAdapter, ColumnParallelLinear):
    """``x Wᵀ + scale · x Aᵀ Bᵀ``, W and B cut by rows."""

    def __init__(
        self, *args: Any, lora: LoraSettings, is_gate_and_up: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        parts = 2 if is_gate_and_up else 1
        self.adapter = LowRankAdapter(lora, self, "rows", num_inner=parts, num_outer=parts)

    @override
    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, in] -> ([s, b, out on this rank], bias); see Megatron's."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self.adapter(input_, is_reduced_outside=self.explicit_expert_comm), bias


class AdaptedRowParallelLinear(_WithAdapter, RowParallelLinear):
    """``x Wᵀ + scale · x Aᵀ Bᵀ``, W and A cut by columns."""

    def __init__(self, *args: Any, lora: LoraSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = LowRankAdapter(lora, self, "columns")

    @override
    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in on this rank] -> ([s, b, out], bias); see Megatron's."""
        output, bias = super().forward(input_)
        return output + self.adapter(input_, is_reduced_outside=self.explicit_expert_comm), bias


class AdaptedReplicatedLinear(_WithAdapter, ReplicatedLinear):
    """``x Wᵀ + scale · x Aᵀ Bᵀ``, all of it whole on every tensor-parallel rank."""

    def __init__(self, *args: Any, lora: LoraSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = LowRankAdapter(lora, self, "none")

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[s, b, in] -> ([s, b, out], no bias)."""
        output, _ = super().forward(x)
        return output + self.adapter(x), None


class AdaptedColumnParallelWeight(_WithAdapter, ColumnParallelWeight):
    """One expert's gate and up: one A for both, as where they are one weight."""

    def __init__(self, *args: Any, lora: LoraSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: LowRankAdapter = ExpertAdapter(lora, self, "rows", num_outer=2)


class AdaptedRowParallelWeight(_WithAdapter, RowParallelWeight):
    """One expert's down projection, with an A and a B of its own."""

    def __init__(self, *args: Any, lora: LoraSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: LowRankAdapter = ExpertAdapter(lora, self, "columns")
