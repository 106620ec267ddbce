"""The report's objective for reinforcement learning (section 3.2.3), as pure functions.

Legend: a group is the K answers ``y_i`` sampled for one prompt ``x``; ``r_i`` their rewards,
``A_i = r_i - mean r``, ``rho_t = pi(y_t) / pi_old(y_t)`` of one token, ``l_i = sum_t log rho_t``
over the tokens that the policy wrote; tau regularises. The report minimises, over prompts,
``1/K sum_i (A_i - tau l_i)^2``.

What is ours, since the report is silent or its form does not do:

- **Divided by 2 tau.** Its gradient is then ``-(A_i - tau l_i) grad log pi``, so that neither
  the size of a step nor the share of the PTX term depends on tau.
- **Length scale.** The raw sum over tokens is the report's; ``per_token`` divides each answer's
  term by its length, as K1.5's released re-implementations do.
- **Dead groups.** A group whose rewards are all equal teaches nothing but would be pulled back
  to pi_old once the policy has moved: it has weight 0 and is in no denominator.
- **Uneven groups.** A rollout that failed is missing from its group: the mean is over those there
  are, and every live group weighs the same.

Every function's sums are over what it is given; weights and counts are of the global batch, so
that micro-batches and data-parallel ranks add up to the loss of the whole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.rl.settings import LengthScale


@dataclass(frozen=True)
class Advantages:
    """Of a global batch of n answers, before any forward pass.

    Attributes:
        values: [n] ``A_i``, in the rewards' dtype; exactly 0 in a dead group.
        weights: [n] 1 / (live groups x answers of the group); 0 in a dead group. They add up to 1
            where a group lives, else to 0.
        num_live_groups: 0 means that no step may be taken: Muon would move at full size.
    """

    values: Tensor
    weights: Tensor
    num_live_groups: int

    @property
    def is_live(self) -> Tensor:
        """[n] booleans."""
        return self.weights > 0


def advantages(rewards: Tensor, groups: Tensor) -> Advantages:
    """Rewards less their group's mean; no division by a standard deviation.

    Args:
        rewards: [n] finite floats.
        groups: [n] integers, equal for answers to one prompt; in any order.

    Raises:
        UserError: shapes differ, or a reward is not finite.
    """
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise UserError(
            f"rewards {list(rewards.shape)}, groups {list(groups.shape)}: expected one of each for "
            "every answer"
        )
    if not bool(rewards.isfinite().all()):
        place = int((~rewards.isfinite()).nonzero()[0])
        raise UserError(
            f"the reward of answer {place} is {rewards[place].item()}; expected a finite number: "
            "an answer that could not be judged stays out of its group"
        )
    names, which = groups.unique(return_inverse=True)
    size = rewards.new_zeros(len(names)).index_add(0, which, torch.ones_like(rewards))
    mean = rewards.new_zeros(len(names)).index_add(0, which, rewards) / size
    least, most = rewards.new_full((2, len(names)), torch.inf)
    least = least.scatter_reduce(0, which, rewards, "amin")
    most = (-most).scatter_reduce(0, which, rewards, "amax")
    is_live = most > least
    num_live = int(is_live.sum())
    weight = torch.where(is_live, 1 / (size * max(num_live, 1)), 0.0)
    values = torch.where(is_live[which], rewards - mean[which], 0.0)
    return Advantages(values, weight[which], num_live)


def sequence_log_ratios(
    log_ratio: Tensor, mask: Tensor, sample: Tensor, num_samples: int
) -> Tensor:
    """``l_i``: whole answers' log-ratios from a packed row's tokens.

    Args:
        log_ratio: [tokens] ``log pi - log pi_old``; what lies outside the mask may be anything,
            not a number included.
        mask: [tokens] booleans: tokens that the policy wrote, of the version that is pi_old. Those
            of tools and the environment, of the prompt, of padding and of segments that an older
            version wrote are out.
        sample: [tokens] integers, the answer each token belongs to; of any value outside the mask.
        num_samples: n.

    Returns:
        [n], differentiable; where a row is split over context-parallel ranks, each one's share,
        to be summed over that group before it is squared.
    """
    kept = torch.where(mask, log_ratio, 0.0)
    return kept.new_zeros(num_samples).index_add(0, torch.where(mask, sample, 0), kept)


def sequence_loss(
    log_ratios: Tensor,
    lengths: Tensor,
    found: Advantages,
    tau: float,
    length_scale: LengthScale = "sum",
) -> Tensor:
    """The report's form: ``sum_i w_i (A_i - tau l_i)^2 / (2 tau)``.

    Args:
        log_ratios: [n] from ``sequence_log_ratios``.
        lengths: [n] tokens in the mask of each answer.
        found: the n answers' advantages and weights.
        tau: more than 0.
        length_scale: the module's docstring.

    Returns:
        A scalar whose value means little; its gradient is what is meant.

    Raises:
        UserError: tau is not more than 0.
    """
    _check(tau)
    squared = (found.values - tau * log_ratios).square() / (2 * tau)
    weights = _scaled(found, lengths, length_scale)
    return torch.where(found.is_live, weights * squared, 0.0).sum()


def token_loss(
    log_ratio: Tensor,
    mask: Tensor,
    sample: Tensor,
    lengths: Tensor,
    found: Advantages,
    tau: float,
    length_scale: LengthScale = "per_token",
    behaviour: Tensor | None = None,
    ratio_cap: float = 2.0,
) -> Tensor:
    """ROLL's form: ``-A log pi + tau / 2 (log rho)^2`` for every token; equal at length 1.

    Args:
        log_ratio: [tokens], as in ``sequence_log_ratios``.
        mask: [tokens]; segments of older versions stay in.
        sample: [tokens].
        lengths: [n] tokens in the mask of each answer, of all context-parallel ranks.
        found: the n answers' advantages and weights.
        tau: more than 0.
        length_scale: the module's docstring; the mean over an answer's tokens by default.
        behaviour: [tokens] ``log pi_old - log mu`` against the version mu that sampled the token;
            its exponential, at most ``ratio_cap`` and a constant to the gradient, weighs the token.
        ratio_cap: where that importance ratio is truncated.

    Raises:
        UserError: tau is not more than 0.
    """
    _check(tau)
    kept = torch.where(mask, log_ratio, 0.0)
    where = torch.where(mask, sample, 0)
    each = -found.values[where] * kept + tau / 2 * kept.square()
    if behaviour is not None:
        each = each * torch.where(mask, behaviour, 0.0).detach().exp().clamp(max=ratio_cap)
    weights = _scaled(found, lengths, length_scale)[where]
    return torch.where(mask & found.is_live[where], weights * each, 0.0).sum()


def window_loss(
    log_ratio: Tensor,
    mask: Tensor,
    sample: Tensor,
    found: Advantages,
    tau: float,
    window: tuple[float, float],
    num_tokens: int,
) -> Tensor:
    """K2.5's form: ``-1/N sum (Clip(rho, a, b) A - tau (log rho)^2)`` (arXiv:2602.02276 eq. 1).

    Its formula clips the ratio, its text speaks of the log-ratio: the window is given in
    log-ratios here, which clips the ratio at their exponentials, so both hold. Outside it the first
    term has no gradient, whatever the sign of A; the second keeps its own.

    Args:
        log_ratio: [tokens] against the version that sampled each.
        mask: [tokens].
        sample: [tokens].
        found: the n answers' advantages.
        tau: more than 0.
        window: least and greatest ``log rho``, around 0.
        num_tokens: N, masked tokens of live groups in the global batch.

    Raises:
        UserError: tau is not more than 0, or 0 is not inside the window.
    """
    _check(tau)
    low, high = window
    if not low < 0 < high:
        raise UserError(f"window {low:g} to {high:g}: expected log-ratios on both sides of 0")
    where = torch.where(mask, sample, 0)
    kept = torch.where(mask, log_ratio, 0.0)
    each = tau * kept.square() - kept.clamp(low, high).exp() * found.values[where]
    return torch.where(mask & found.is_live[where], each, 0.0).sum() / max(num_tokens, 1)


def _scaled(found: Advantages, lengths: Tensor, length_scale: LengthScale) -> Tensor:
    if length_scale == "sum":
        return found.weights
    return found.weights / lengths.to(found.weights.dtype).clamp(min=1)


def _check(tau: float) -> None:
    if not tau > 0:
        raise UserError(f"tau {tau:g}: expected more than 0; a small one is all but REINFORCE")
