"""What an iteration of training was, as records, and as metrics by name."""

import math
from dataclasses import dataclass

from megatron_k2.run.metrics import StepRecord


@dataclass(frozen=True)
class Mismatch:
    """Trainer against engine at temperature 1, in nats a token, over an iteration's batches."""

    num_tokens: int
    mean_absolute: float
    largest: float
    mean: float
    """Of log pi - log mu; under 0 where the engine was surer of what it drew."""
    kl: float
    """Mean of (rho - 1 - log rho), rho = pi / mu: an estimate of KL(mu | pi), never negative."""

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} log-probabilities differ by {self.mean_absolute:.1e} nats on "
            f"average, by {self.largest:.1e} at most"
        )


@dataclass(frozen=True)
class Measured:
    """What the passes of a step showed; means are over trained tokens of the global batch."""

    loss: float
    """What was differentiated: the objective and each weighted NLL. Its value means little."""
    objective: float
    ptx_nll: float | None
    """Nats per token of the PTX packs, where there are any."""
    lesson_nll: float | None
    """Nats per letter of the critic's lessons, where there are any."""
    entropy: float
    """Of the policy at the temperature of each token, in nats."""
    log_ratio: float
    """Of log pi / pi_old, before the step."""
    kl: float
    """An estimate of KL(pi_old | pi), never negative."""
    step: StepRecord
    """Gradient norm, maximum logits, clips, loads, update RMS."""


@dataclass(frozen=True)
class Update:
    """One mini-batch, and the step it took."""

    number: int
    """Of the mini-batch in the run, from 1: Megatron's iteration."""
    version: int
    """Optimizer steps behind the weights, after it."""
    is_taken: bool
    """Whether there was a step: not without a live group, nor with a gradient that is no number."""
    num_groups: int
    num_live_groups: int
    num_answers: int
    """Of live groups."""
    num_trained_tokens: int
    num_tokens: int
    """Rows of all packs that are not padding."""
    num_saved: int
    """Rows more that there would be if no answer shared its prompt's."""
    measured: Measured | None
    """``None`` where no pass was run."""


@dataclass(frozen=True)
class Learnt:
    """An iteration's work."""

    mismatch: Mismatch
    updates: tuple[Update, ...]
    old_seconds: float
    """Of building packs and the forward pass before the first step."""
    step_seconds: float


def metrics(learnt: Learnt) -> dict[str, float]:
    """Names to numbers, of an iteration; what nothing is known of is left out.

    ``learn/mismatch`` (mean over tokens of the absolute difference, nats),
    ``learn/mismatch_largest`` and ``learn/mismatch_kl``; ``learn/steps``, ``learn/live_groups``,
    ``learn/tokens``, ``learn/saved_tokens`` (rows that answers share), ``learn/clipped_heads``
    of all mini-batches; means over them of ``learn/loss``, ``learn/objective``,
    ``learn/ptx_nll``, ``learn/lesson_nll``, ``learn/entropy``, ``learn/log_ratio``; their largest
    ``learn/kl``, ``learn/grad_norm``, ``learn/max_logit`` and ``learn/update_rms`` (of the group
    where it is largest, times the learning rate).
    """
    passes = [each.measured for each in learnt.updates if each.measured is not None]
    steps = [each.step for each in passes]
    found = {
        "learn/steps": float(sum(each.is_taken for each in learnt.updates)),
        "learn/live_groups": float(sum(each.num_live_groups for each in learnt.updates)),
        "learn/tokens": float(sum(each.num_tokens for each in learnt.updates)),
        "learn/saved_tokens": float(sum(each.num_saved for each in learnt.updates)),
        "learn/clipped_heads": float(sum(step.num_clipped_heads for step in steps)),
        "learn/mismatch": learnt.mismatch.mean_absolute,
        "learn/mismatch_largest": learnt.mismatch.largest,
        "learn/mismatch_kl": learnt.mismatch.kl,
    }
    for name in ("loss", "objective", "ptx_nll", "lesson_nll", "entropy", "log_ratio"):
        values = [value for each in passes if (value := getattr(each, name)) is not None]
        if values:
            found[f"learn/{name}"] = sum(values) / len(values)
    if passes:
        found["learn/kl"] = max(each.kl for each in passes)
        found["learn/grad_norm"] = max(step.grad_norm for step in steps)
        found["learn/max_logit"] = max(step.max_logit for step in steps)
    moved = [
        step.learning_rate * max(step.update_rms.values()) for step in steps if step.update_rms
    ]
    if moved:
        found["learn/update_rms"] = max(moved)
    return {name: value for name, value in found.items() if not math.isnan(value)}
