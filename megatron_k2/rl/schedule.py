"""What changes from one iteration to the next: the sampling temperature, and Toggle's phases.

Report section 3.2.3: a high temperature early, decayed over training. Its schedule is not stated;
the kinds here are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_k2.errors import UserError

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Temperature:
    """A sampling temperature by iteration.

    Attributes:
        start: at iteration 0, more than 0.
        end: from iteration ``iterations`` on.
        iterations: that the decay takes; 0 where it is constant.
        kind: the shape between them.

    Raises:
        UserError: a temperature that is not more than 0, or a decay without a length.
    """

    start: float
    end: float
    iterations: int = 0
    kind: Kind = "constant"

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise UserError(f"temperature {self}: expected finite numbers over 0")
        if self.kind == "constant":
            if self.start != self.end:
                raise UserError(f"temperature {self}: a constant one does not change")
        elif self.iterations < 1:
            raise UserError(f"temperature {self}: expected a decay over at least one iteration")

    def __str__(self) -> str:
        if self.kind == "constant":
            return f"{self.start:g}"
        return f"{self.kind}:{self.start:g}:{self.end:g}:{self.iterations}"

    def at(self, iteration: int) -> float:
        """The temperature that iteration samples at."""
        if self.kind == "constant" or iteration >= self.iterations:
            return self.end
        share = iteration / self.iterations
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share

    @classmethod
    def parse(cls, text: str) -> "Temperature":
        """``0.8``, or ``linear:1.0:0.7:100``: kind, start, end, iterations.

        Raises:
            UserError: neither.
        """
        kind, *rest = text.split(":")
        try:
            if not rest:
                return cls(float(kind), float(kind))
            start, end, iterations = rest
            if kind in get_args(Kind):
                return cls(float(start), float(end), int(iterations), kind)  # type: ignore[arg-type]
        except ValueError:
            pass
        raise UserError(
            f"temperature {text!r}: expected a number, or KIND:START:END:ITERATIONS with a kind of "
            f"{', '.join(get_args(Kind))}"
        )


@dataclass(frozen=True)
class Toggle:
    """K2.5's alternation of a length budget and none (arXiv:2602.02276 eq. 2).

    In even phases a right answer counts only within its prompt's budget, unless the group is right
    less often than ``accuracy``; in odd phases rewards are as they are.

    Attributes:
        iterations: of one phase.
        accuracy: mean reward of a group from which on its budget binds.
        percentile: of right answers' lengths, 0 to 100, that is a prompt's budget.
    """

    iterations: int
    accuracy: float
    percentile: float

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 <= self.percentile <= 100:
            raise UserError(
                f"{self}: expected phases of 1 iteration or more and a percentile of 0 to 100"
            )

    def budget(self, right_lengths: Sequence[int]) -> int | None:
        """A prompt's budget in tokens, fixed at the start; ``None`` where no answer was right.

        The smallest length such that ``percentile`` per cent of right answers are as short.
        """
        if not right_lengths:
            return None
        place = math.ceil(self.percentile / 100 * len(right_lengths)) - 1
        return sorted(right_lengths)[max(place, 0)]

    def rewards(
        self, iteration: int, rewards: Sequence[float], lengths: Sequence[int], budget: int | None
    ) -> tuple[float, ...]:
        """A group's rewards in that iteration."""
        is_free = iteration // self.iterations % 2 == 1
        if is_free or budget is None or sum(rewards) < self.accuracy * len(rewards):
            return tuple(rewards)
        within = [length <= budget for length in lengths]
        return tuple(r if ok else 0.0 for r, ok in zip(rewards, within, strict=True))
