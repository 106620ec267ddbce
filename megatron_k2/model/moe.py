"""What the host's MoE layer lacks: Moonlight's form of the balance rule, and load statistics.

Also here, since it is seen where gradients are finalised: a batch without a token to learn from.

Routing itself is Megatron's ``TopKRouter`` with K2's flags: sigmoid scores in fp32, the bias added
for selection only, the chosen scores normalised and scaled by 2.827. The bias of expert i moves
after each step by ``u * sign(mean load - load_i)`` (arXiv:2408.15664); Moonlight (arXiv:2502.16982,
appendix C) subtracts the mean of those signs, so that biases do not drift together. Which of the
two K2 uses is not published; upstream's is the default.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

BIAS_RULES = ("sign", "mean-sign")


def routers(model_chunks: list[torch.nn.Module]) -> Iterator[TopKRouter]:
    """Every router with a selection bias on this rank, in layer order."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter) and module.expert_bias is not None:
                yield module


def remove_common_drift(before: Tensor, after: Tensor) -> Tensor:
    """Turn upstream's bias update into Moonlight's: b + u (sign(e) - mean sign(e)).

    Args:
        before: biases before the update [e] fp32.
        after: ``before + u * sign(e)`` [e] fp32.

    Returns:
        The biases with the mean of the movement taken out, [e] fp32.
    """
    return after - (after - before).mean()


class BalancedFinalize:
    """``finalize_model_grads_func`` that also keeps each layer's load and applies the bias rule.

    ``loads`` after a step: one [num experts] fp32 tensor a router of this rank, tokens routed to
    each expert in the global batch: summed over micro-batches and over the tensor-, data- and
    context-parallel ranks.

    A batch whose every token is masked moves no bias; ``is_batch_empty`` tells the optimizer.

    Args:
        finalize: upstream's.
        rule: of the biases.
        is_counting: whether tokens come through ``count``: without ``--calculate-per-token-loss``
            upstream hands none over.
    """

    def __init__(
        self, finalize: Callable[..., None], rule: str = "sign", *, is_counting: bool = False
    ) -> None:
        if rule not in BIAS_RULES:
            raise ValueError(f"bias rule {rule!r} is not one of {BIAS_RULES}")
        self._finalize = finalize
        self._rule = rule
        self.loads: list[Tensor] = []
        self._num_tokens: Tensor | None = None
        self.is_counting = is_counting
        self._counted: Tensor | None = None

    def count(self, num_tokens: Tensor) -> None:
        """Add a micro-batch's unmasked tokens, of the last pipeline stage."""
        self._counted = num_tokens if self._counted is None else self._counted + num_tokens

    def __call__(
        self,
        model: list[torch.nn.Module],
        num_tokens: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Upstream's gradient finalisation, with the load read before it is cleared.

        ``num_tokens``: unmasked, of this rank's batch; upstream sums them up in place, so that
        every rank ends with those of the global batch. ``None`` without a loss per token.
        """
        here = list(routers(model))
        local_loads = [router.local_tokens_per_expert.clone() for router in here]
        before = [router.expert_bias.clone() for router in here]
        self._finalize(model, num_tokens, *args, **kwargs)
        if self.is_counting:
            num_tokens = self._sum_of_counts()
        self._num_tokens = num_tokens
        if num_tokens is not None:  # no host-side branch, which would wait for the device
            for router, old in zip(here, before, strict=True):
                router.expert_bias.copy_(torch.where(num_tokens > 0, router.expert_bias, old))
        if self._rule == "mean-sign":
            for router, old in zip(here, before, strict=True):
                router.expert_bias.copy_(remove_common_drift(old, router.expert_bias))
        self.loads = self._reduced(local_loads)

    def is_batch_empty(self) -> bool:
        """Whether every token of the last global batch was masked; the same on every rank."""
        return self._num_tokens is not None and int(self._num_tokens) == 0

    def _sum_of_counts(self) -> Tensor:
        """Tokens of the global batch from the last stage's counts, as upstream sums its own."""
        from megatron.core import parallel_state

        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        counted, self._counted = self._counted, None
        total = torch.zeros((), dtype=torch.int, device=device) if counted is None else counted
        torch.distributed.broadcast(
            total,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
        return total

    def _reduced(self, local_loads: list[Tensor]) -> list[Tensor]:
        if not local_loads:
            return []
        from megatron.core import parallel_state

        stacked = torch.stack(local_loads)
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(stacked, group=group)
        return list(stacked)
