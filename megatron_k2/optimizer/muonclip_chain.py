"""Whose gradients are clipped, and the norm of AdamW's beside the global one.

Megatron scales every gradient by min(1, ``clip_grad`` / ‖all‖). Muon's update forgets the length of
what it orthogonalises, but its momentum does not: a clipped step weighs less in it. The K2 report
states neither; ``all`` is Megatron's behaviour, ``adam`` scales AdamW's gradients alone, by the
same factor.

The seam is two public methods of the chain: ``get_grad_norm`` runs when the gradients are unscaled
and not yet clipped, ``step_with_ready_grads`` when they are about to be used. In between, Megatron
clips the optimizers whose configuration asks for it; none does, because here AdamW's gradients are
scaled in place and Muon's when its momentum reads them anyway. Parameters that were given a norm
group of their own are scaled by the global norm like all others.
"""

import copy
import math
from typing import Any, override

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from megatron_k2.optimizer.step_statistics import GROUPS, Part, adamw_update_sums

NORM_EPS = 1e-6
"""Megatron's, beside the norm that ``clip_grad`` is divided by."""


def square_sum(grads: list[Tensor], device: torch.device) -> Tensor:
    """Σ g² of all elements, a scalar in fp32; 0 for no gradients."""
    if not grads:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(grads)).float().square().sum()


def grad_norm_factor(limit: float, norm: Any) -> float | Tensor | None:
    """min(1, ``limit`` / ``norm``) as Megatron forms it; None if nothing is to be scaled.

    Args:
        limit: of the norm; 0: none.
        norm: a number, or a tensor where the host leaves it on the device.
    """
    if limit <= 0:
        return None
    factor = limit / (norm + NORM_EPS)
    if isinstance(factor, Tensor):
        return factor.reshape(()).clamp(max=1.0)  # Transformer Engine's norm is [1]
    return factor if factor < 1 else None


class MuonAdamWChain(ChainedOptimizer):
    """Megatron's chain, knowing which parameters are AdamW's; turned into this by ``adopt``.

    Attributes:
        adamw_square_sum: this rank's share of Σ g² over AdamW's gradients in the last step that
            was not skipped, before clipping; the shares of all ranks of the world add up to it.
    """

    adamw_square_sum: Tensor
    _clip_grad: float
    _scope: str

    def limit_clipping(self, scope: str) -> None:
        """Begin to keep AdamW's norm; clip only what ``scope`` names.

        Args:
            scope: ``all`` or ``adam``.
        """
        self._scope, self._clip_grad = scope, self.config.clip_grad
        device = torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda")
        self.adamw_square_sum = torch.zeros((), device=device)
        for optimizer in self.chained_optimizers:
            optimizer.config = copy.copy(optimizer.config)
            optimizer.config.clip_grad = 0.0

    def adamw_parameters(self, optimizer: MegatronOptimizer) -> list[Tensor]:
        """The parameters of ``optimizer`` (fp32 masters or shards) that AdamW updates."""
        raise NotImplementedError

    def muon_of(self, optimizer: MegatronOptimizer) -> Any:
        """What takes Muon's step in ``optimizer``, or None.

        It has a ``matrix_group``, and reads ``grad_factor`` as ``muon.update_momenta`` does.
        """
        raise NotImplementedError

    @override
    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        self._grad_norm = super().get_grad_norm()
        total = torch.zeros_like(self.adamw_square_sum)
        for optimizer in self._with_parameters():
            grads = optimizer._filter_grads_for_norm(self.adamw_parameters(optimizer))
            # Its grad-statistics group holds each element once: all ranks under ZeRO, else the
            # model-parallel ones, beside as many copies as there are such groups.
            num_copies = dist.get_world_size() / optimizer.get_grad_stats_parallel_group().size()
            total += square_sum(grads, total.device) / num_copies
        self.adamw_square_sum = total
        return self._grad_norm

    @override
    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        factor = grad_norm_factor(self._clip_grad, self._grad_norm)
        for optimizer in self._with_parameters():
            muon = self.muon_of(optimizer)
            if muon is not None:
                muon.grad_factor = factor if self._scope == "all" else None
            grads = [p.grad for p in self.adamw_parameters(optimizer) if p.grad is not None]
            if factor is not None and grads:
                torch._foreach_mul_(grads, factor)
        return super().step_with_ready_grads()

    def _with_parameters(self) -> list[MegatronOptimizer]:
        return [o for o in self.chained_optimizers if not getattr(o, "is_stub_optimizer", False)]

    def reduce_adamw_square_sum(self) -> tuple[Tensor, dist.Work | None]:
        """Begin to add up Σ g² of AdamW's gradients over the world, for the log, after the step."""
        total = self.adamw_square_sum.clone()
        return total, dist.all_reduce(total, async_op=True)

    def reduce_update_sums(self) -> tuple[Tensor, dist.Work | None] | None:
        """Begin to add up what the last step's updates were, for the log, after it; None unless so.

        Returns:
            [3, 2] fp64: of each of ``step_statistics.GROUPS`` the sum of squares, in units of η,
            and the number of elements; of all ranks when the work is done.
        """
        groups = self._watched_groups()
        if not groups:
            return None
        sums = torch.zeros(len(GROUPS), 2, dtype=torch.float64, device=self.adamw_square_sum.device)
        for group, factor in groups:
            sums[:2] += group.statistics.sums * sums.new_tensor([factor**2, 1.0])
        for optimizer in self._with_parameters():
            adamw = [
                p
                for p in self.adamw_parameters(optimizer)
                if param_is_not_tensor_parallel_duplicate(
                    p, tp_group=getattr(optimizer, "tp_group", None)
                )
            ]
            if adamw:
                sums[2] += adamw_update_sums(adamw, optimizer.optimizer)
        return sums, dist.all_reduce(sums, async_op=True)

    def part_seconds(self, part: Part) -> float:
        """Seconds of ``part`` in this rank's last step; -inf if not watched or not done yet."""
        groups = self._watched_groups()
        return sum(group.statistics.seconds(part) for group, _ in groups) if groups else -math.inf

    def _watched_groups(self) -> list[tuple[Any, float]]:
        """Each matrix group that keeps statistics, and its RMS factor."""
        muons = [muon for o in self._with_parameters() if (muon := self.muon_of(o)) is not None]
        return [
            (muon.matrix_group, muon.settings.scale_factor)
            for muon in muons
            if muon.matrix_group.statistics is not None
        ]
