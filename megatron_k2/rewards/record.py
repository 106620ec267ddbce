"""One answer's reward: what is known of its correctness apart from what shapes behaviour.

The K2 report names the parts (correctness, rubric, token budget, format) and no weights; how they
add up is our choice and stands in one place, ``combined``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_k2.errors import UserError


@dataclass(frozen=True)
class Reward:
    """What one answer earned.

    Raises:
        UserError: a part that is no finite number.
    """

    correctness: float | None
    """From a verifier or a critic, usually 0 to 1; ``None``: not known, the answer is masked."""
    shaping: Mapping[str, float] = field(default_factory=dict)
    """Named parts that say nothing of correctness: budget, format."""
    reason: str = ""
    """Why it is masked, or what the parts saw."""

    def __post_init__(self) -> None:
        parts = {"correctness": self.correctness or 0.0, **self.shaping}
        for name, value in parts.items():
            if not math.isfinite(value):
                raise UserError(f"reward part {name}={value}: expected a finite number")

    @property
    def is_masked(self) -> bool:
        """Whether nothing may be learnt from it: unknown is not 0."""
        return self.correctness is None


def combined(reward: Reward, weights: Mapping[str, float] | None = None) -> float | None:
    """``correctness + Σ w · part``; ``None`` for a masked reward.

    Args:
        reward: of one answer.
        weights: of shaping's parts; 1 where none is given.

    Raises:
        UserError: a weight for a part that the reward does not have.
    """
    weights = weights or {}
    if unknown := set(weights) - set(reward.shaping):
        raise UserError(
            f"weight of {', '.join(sorted(unknown))}: this reward has "
            f"{', '.join(sorted(reward.shaping)) or 'no shaping'}"
        )
    if reward.correctness is None:
        return None
    parts = (weights.get(name, 1.0) * value for name, value in reward.shaping.items())
    return reward.correctness + sum(parts)
