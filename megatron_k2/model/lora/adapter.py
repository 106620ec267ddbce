"""A and B of one linear: their parameters, their product, and how they are cut over the ranks.

Beside a linear whose weight W [out, in] is cut by rows (column-parallel), A is whole on every rank
and B is cut like W; by columns (row-parallel), A is cut like W and B is whole; replicated, both are
whole. What crosses the ranks is then [tokens, rank], not [tokens, out].

Gradients. Whole under sequence parallelism, a factor sees its rank's tokens alone, and Megatron
sums what is marked ``sequence_parallel`` over the tensor-parallel group. Where the linear leaves
communication to its caller (routed experts under expert tensor parallelism, overlapped shared
experts), the gradient of the whole factor is summed here, and that of the input stays the partial
sum which the caller adds up.

First values: A uniform in ±1/√in (the published implementation's), drawn by the parameter's name
and cut afterwards, so that they are the same at every layout; B zeros, so that training begins at
the base model.
"""

import contextlib
import hashlib
from typing import Any, Literal, override

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_k2.model.lora.settings import LoraSettings

Split = Literal["rows", "columns", "none"]
"""How the linear's weight [out, in] is cut over its tensor-parallel group."""

ADAPTER = "adapter"
"""What the module is called in its linear, and so in every parameter's name."""


class LowRankAdapter(torch.nn.Module):
    """``x ↦ (alpha / rank) B A x`` beside one linear, of which it holds no reference.

    Args:
        settings: rank, scale, dropout.
        linear: what it stands beside, for shape, dtype, device and groups of its weight.
        split: of the linear's weight.
        num_inner: A's in ``lora_a``, one above the other, each multiplied by its part of B's rows:
            2 where gate and up have an A each.
        num_outer: matrices in ``lora_b``, one above the other: 2 for gate and up.
    """

    lora_a: torch.nn.Parameter
    """[num_inner · rank, in on this rank]."""
    lora_b: torch.nn.Parameter
    """[out on this rank, rank]."""

    def __init__(
        self,
        settings: LoraSettings,
        linear: Any,
        split: Split,
        *,
        num_inner: int = 1,
        num_outer: int = 1,
    ) -> None:
        super().__init__()
        weight = linear.weight
        self.settings, self.split = settings, split
        self.num_inner, self.num_outer = num_inner, num_outer
        self.tp_group = getattr(linear, "tp_group", None)
        self.is_expert = bool(getattr(linear, "is_expert", False))
        self.is_sequence_parallel = bool(getattr(weight, "sequence_parallel", False)) or bool(
            getattr(linear, "sequence_parallel", False)
        )
        out_size, in_size = weight.shape
        like = {"dtype": weight.dtype, "device": weight.device}
        a = torch.zeros(num_inner * settings.rank, in_size, **like)
        b = torch.zeros(out_size, settings.rank, **like)
        self.lora_a, self.lora_b = torch.nn.Parameter(a), torch.nn.Parameter(b)
        for param in (self.lora_a, self.lora_b):
            param.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
        if split == "rows":
            set_tensor_model_parallel_attributes(self.lora_b, True, 0, 1)
        elif split == "columns":
            set_tensor_model_parallel_attributes(self.lora_a, True, 1, 1)
        whole = {"rows": [self.lora_a], "columns": [self.lora_b]}.get(
            split, [self.lora_a, self.lora_b]
        )
        for param in whole:
            is_marked = self.is_sequence_parallel and not self.is_expert
            param.sequence_parallel = is_marked  # type: ignore[attr-defined]

    def num_matrices_in(self, factor: Tensor) -> int:
        """Matrices stacked along the rows of ``lora_a`` or ``lora_b``, as MuonClip takes them."""
        return self.num_inner if factor is self.lora_a else self.num_outer

    @override
    def forward(self, x: Tensor, *, is_reduced_outside: bool = False) -> Tensor:
        """What is added to the linear's output.

        Args:
            x: [s, b, in], as the linear gets it: the rank's own tokens under sequence parallelism
                in front of a linear cut by rows.
            is_reduced_outside: whether the linear leaves gathering and reducing to its caller.

        Returns:
            [s, b, out], cut and reduced as the linear's own output.
        """
        a, b = self.factors(is_reduced_outside=is_reduced_outside)
        inner = F.linear(self.dropped(x), a) * self.settings.scale
        if not is_reduced_outside:
            inner = self._exchanged(inner)
        if self.num_inner == 1:
            return F.linear(inner, b)
        parts = zip(inner.chunk(self.num_inner, -1), b.chunk(self.num_inner), strict=True)
        return torch.cat([F.linear(part, rows) for part, rows in parts], -1)

    def factors(self, *, is_reduced_outside: bool) -> tuple[Tensor, Tensor]:
        """A and B; with ``is_reduced_outside`` the whole one's gradient is summed over the group.

        To be reached by calling the module (``ExpertAdapter``) or in its forward pass: with
        ``--overlap-param-gather`` Megatron waits for parameters in a pre-hook of the module.
        """
        a: Tensor = self.lora_a
        b: Tensor = self.lora_b
        if is_reduced_outside and self.tp_group is not None and self.tp_group.size() > 1:
            if self.split == "rows":
                a = copy_to_tensor_model_parallel_region(a, group=self.tp_group)
            elif self.split == "columns":
                b = copy_to_tensor_model_parallel_region(b, group=self.tp_group)
        return a, b

    def dropped(self, x: Tensor) -> Tensor:
        """``x`` with ``settings.dropout`` of it set to zero, in training.

        Ranks that hold different tokens or columns of it draw from their own random state, ranks
        that hold the same from the common one.
        """
        if not self.training or self.settings.dropout == 0:
            return x
        is_same = self.split != "columns" and not self.is_sequence_parallel and not self.is_expert
        name = [get_expert_parallel_rng_tracker_name()] if self.is_expert else []
        own = contextlib.nullcontext() if is_same else get_cuda_rng_tracker().fork(*name)
        with own:
            return F.dropout(x, self.settings.dropout)

    def _exchanged(self, inner: Tensor) -> Tensor:
        """[s, b, num_inner · rank], of the tokens that B is to see, summed where A is cut."""
        if self.tp_group is None or self.tp_group.size() == 1 or self.split == "none":
            return inner
        if self.split == "rows" and self.is_sequence_parallel:
            return gather_from_sequence_parallel_region(inner, group=self.tp_group)
        if self.split == "rows":
            return copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        if self.is_sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)

    @torch.no_grad()
    def initialise(self, name: str) -> None:
        """First values, of A by ``name``: the module's, as at TP1, EP1 and PP1."""
        size = 1 if self.tp_group is None or self.split != "columns" else self.tp_group.size()
        rank = 0 if size == 1 or self.tp_group is None else self.tp_group.rank()
        rows, cols = self.lora_a.shape
        digest = hashlib.sha256(f"{self.settings.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        whole = torch.empty(rows, size * cols)
        whole.uniform_(-((size * cols) ** -0.5), (size * cols) ** -0.5, generator=generator)
        self.lora_a.copy_(whole[:, rank * cols : (rank + 1) * cols])
        self.lora_b.zero_()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Both factors, cut as the linear's weight; gate and up of B apart, as Megatron's fc1."""
        axes = {"rows": {"lora_b": 0}, "columns": {"lora_a": 1}, "none": {}}[self.split]
        groups = {}
        if self.tp_group is not None:
            groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        own = {"lora_a": self.lora_a, "lora_b": self.lora_b}
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own, prefix, axes, sharded_offsets, **groups
        )
        if self.num_outer == 2:
            found[f"{prefix}lora_b"] = apply_swiglu_sharded_factory(
                found[f"{prefix}lora_b"],
                sharded_offsets,
                metadata.get("singleton_local_shards", False),
                tp_group=self.tp_group,
                dp_group=metadata["dp_cp_group"],
            )
        return found


class ExpertAdapter(LowRankAdapter):
    """The factors of one routed expert's linear; its experts are multiplied together elsewhere."""

    @override
    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """A [rank, in] and B [out, rank]."""
        return self.factors(is_reduced_outside=True)
