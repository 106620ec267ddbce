"""Token budgets: an answer over its task type's budget is cut, and pays for it.

Report section 3.2.3: a maximum of tokens a sample by task type; what is over it is truncated and
penalised. Budgets and penalties are not stated: these are ours, to be set by task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_k2.errors import UserError

PENALTY = 0.5
"""Ours: an answer that was cut and is right still beats one that is wrong by half."""


@dataclass(frozen=True)
class Budget:
    """Of one task type.

    Raises:
        UserError: a budget below 1, or a penalty below 0.
    """

    max_tokens: int
    penalty: float = PENALTY

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.penalty < 0:
            raise UserError(
                f"budget of {self.max_tokens} tokens, penalty {self.penalty:g}: expected 1 or more "
                "tokens and a penalty of 0 or more"
            )

    def cut(self, ids: Sequence[int]) -> tuple[tuple[int, ...], float]:
        """The tokens that count, and the shaping part ``budget``: 0, or minus the penalty."""
        is_over = len(ids) > self.max_tokens
        return tuple(ids[: self.max_tokens]), -self.penalty if is_over else 0.0


def budget_of(budgets: Mapping[str, Budget], task_type: str) -> Budget:
    """The budget of a task type.

    Raises:
        UserError: there is none.
    """
    if task_type not in budgets:
        raise UserError(f"no token budget for {task_type!r}; there are: {', '.join(budgets)}")
    return budgets[task_type]
