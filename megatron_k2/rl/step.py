"""The loss of one micro-batch, and what a step measures beside it.

``objective + lambda_ptx * NLL per token``, both over the global batch, and where a critic is taught
its letters' NLL likewise, with a weight of its own. A micro-batch returns its share times N, the
batch's number of targets, and the number of its own, so that Megatron's division by all targets
(``--calculate-per-token-loss``) leaves plain sums, and prediction layers, which divide by targets
themselves, are weighed as in fine-tuning.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from megatron_k2.rl.batch import Batch
from megatron_k2.rl.micro_batch import MicroBatch, forward, scored
from megatron_k2.rl.objective import (
    Advantages,
    sequence_log_ratios,
    sequence_loss,
    token_loss,
    window_loss,
)
from megatron_k2.rl.replay import Replay
from megatron_k2.rl.settings import Objective

SUMS = ("objective", "nll", "lesson_nll", "entropy", "log_ratio", "kl")
"""Over a step: the objective alone; over tokens: the PTX NLL and the critic's, times weights, and
over trained tokens entropy, log pi/pi_old, and (rho - 1 - log rho), whose mean estimates
KL(pi_old | pi)."""


def loss_of(
    batch: MicroBatch, objective: Objective, whole: Batch, output: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss, for Megatron's schedules.

    Args:
        batch: this rank's rows.
        objective: constants.
        whole: the step's batch.
        output: of ``micro_batch.scored``, [2, s / CP].

    Returns:
        The loss times N, int32 number of targets of this rank, and ``sums``: [len(SUMS)] fp32,
        to be added up over micro-batches, data- and context-parallel ranks.
    """
    logprobs, entropy = output
    assert batch.old is not None  # the last stage computed it
    ratio = logprobs - batch.old.logprobs
    policy = _policy_loss(batch, objective, whole, ratio)
    nll = _nll(logprobs, batch.nll_weight)
    lesson_nll = _nll(logprobs, batch.lesson_weight)
    share = objective.ptx_weight / max(whole.num_ptx_targets, 1)
    lesson_share = objective.lesson_weight / max(whole.num_lesson_targets, 1)
    loss = (policy + share * nll + lesson_share * lesson_nll) * whole.num_targets
    num_targets = batch.is_target.sum(dtype=torch.int32)
    with torch.no_grad():
        kept = torch.where(batch.is_trained, ratio, 0.0)
        is_counted = objective.form != "sequence" or mpu.get_context_parallel_rank() == 0
        sums = [
            policy if is_counted else torch.zeros_like(policy),
            nll,
            lesson_nll,
            torch.where(batch.is_trained, entropy, 0.0).sum(),
            kept.sum(),
            (kept.exp() - 1 - kept).sum(),
        ]
        report = torch.stack(sums).detach()
    return loss, num_targets, {"sums": report}


def _nll(logprobs: Tensor, weight: Tensor) -> Tensor:
    """[s / CP] each -> the weighted sum; rows without a weight may hold anything."""
    return torch.where(weight > 0, -logprobs * weight, 0.0).sum()


def _policy_loss(batch: MicroBatch, objective: Objective, whole: Batch, ratio: Tensor) -> Tensor:
    """This rank's share; of the sequence form the whole, whose gradient is this rank's share."""
    if not len(batch.advantage):
        return ratio.sum() * 0.0
    found = Advantages(batch.advantage, batch.weight, whole.num_live_groups)
    old = batch.old
    assert old is not None
    if objective.form == "sequence":
        sums = sequence_log_ratios(ratio, batch.is_trained, batch.sample, len(batch.advantage))
        sums = _Joined.apply(sums, mpu.get_context_parallel_group())
        return sequence_loss(sums, batch.lengths, found, objective.tau, objective.length_scale)
    if objective.form == "token":
        return token_loss(
            ratio,
            batch.is_trained,
            batch.sample,
            batch.lengths,
            found,
            objective.tau,
            objective.length_scale,
            old.over_behaviour,
            objective.ratio_cap,
        )
    return window_loss(
        ratio + old.over_behaviour,
        batch.is_trained,
        batch.sample,
        found,
        objective.tau,
        objective.window,
        whole.num_trained,
    )


class _Joined(torch.autograd.Function):
    """Sum over context-parallel ranks; the gradient of a sum that each of them goes on from alike.

    The same function of it follows on every rank, so that its gradient is that of each share, and
    shares of the weights' gradients are what Megatron adds up.
    """

    @staticmethod
    def forward(ctx: Any, shares: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        """[n] shares of this rank -> [n], reduced over ``group``."""
        if group.size() == 1:
            return shares
        whole = shares.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """As it is."""
        return grads[0], None


def forward_step(
    iterator: Iterator[MicroBatch],
    stage: torch.nn.Module,
    *,
    objective: Objective,
    whole: Batch,
    replay: Replay | None,
) -> tuple[Tensor, Any]:
    """One micro-batch through a stage, and its loss function, as Megatron's schedules ask."""
    output, batch = forward(iterator, stage, replay, scored)
    return output, partial(loss_of, batch, objective, whole)
