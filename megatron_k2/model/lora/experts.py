"""The routed experts of one rank with an A and a B each, computed together."""

from typing import Any, override

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.model.experts import (
    ColumnParallelWeight,
    GroupedExperts,
    RowParallelWeight,
    grouped_linear,
)
from megatron_k2.model.lora.linears import AdaptedColumnParallelWeight, AdaptedRowParallelWeight
from megatron_k2.model.lora.settings import LoraSettings


class AdaptedExperts(GroupedExperts):
    """``GroupedExperts`` whose products have a low-rank one beside them.

    Every expert has its own A and B, so that the result does not depend on which experts share a
    rank. The rank is a row's size in the grouped product and must be a multiple of 16 bytes.
    """

    def __init__(self, *args: Any, lora: LoraSettings, **kwargs: Any) -> None:
        self.lora = lora
        super().__init__(*args, **kwargs)
        multiple = 16 // self.config.params_dtype.itemsize
        if lora.rank % multiple:
            raise UserError(
                f"--lora-rank {lora.rank} with routed experts in {self.config.params_dtype}: the "
                f"grouped product needs rows of 16 bytes, a multiple of {multiple}"
            )

    @override
    def weight_modules(self) -> MLPSubmodules:
        names = self.lora.targets
        fc1: Any = ColumnParallelWeight
        fc2: Any = RowParallelWeight
        if "experts.linear_fc1" in names:
            fc1 = ModuleSpec(AdaptedColumnParallelWeight, {"lora": self.lora})
        if "experts.linear_fc2" in names:
            fc2 = ModuleSpec(AdaptedRowParallelWeight, {"lora": self.lora})
        return MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2)

    @override
    def product(self, x: Tensor, tokens_per_expert: Tensor, linears: list[Any]) -> Tensor:
        base = super().product(x, tokens_per_expert, linears)
        if not hasattr(linears[0], "adapter"):
            return base
        factors = [linear.adapter() for linear in linears]
        dropped = linears[0].adapter.dropped(x)
        inner = grouped_linear(dropped, tokens_per_expert, [a for a, _ in factors])
        inner = inner * self.lora.scale
        return base + grouped_linear(inner, tokens_per_expert, [b for _, b in factors])
