"""How long answers are: log-normal, cut at the most that an answer may have.

Long tails are what a rollout waits for (Seer, arXiv:2511.14617); a log-normal is the simplest with
one. Neither its middle nor its width is published for K2: both are a recipe's choices.
"""

import math
import random
from dataclasses import dataclass
from statistics import NormalDist

from megatron_k2.errors import UserError

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Lengths:
    """Of prompts and answers, in tokens.

    Raises:
        UserError: a length below 1, or a width below 0.
    """

    median: float
    """Of an answer."""
    sigma: float
    """Standard deviation of its logarithm: 1 is a mean 1.6 times the median, one of a hundred ten
    times as long."""
    most: int
    """Where an answer is cut."""
    prompt: int
    """Mean of a prompt."""

    def __post_init__(self) -> None:
        if min(self.median, self.most, self.prompt) < 1 or self.sigma < 0:
            raise UserError(f"{self}: expected lengths of 1 token or more and a width from 0")

    def moment(self, order: int) -> float:
        """The mean of an answer's length to the power of ``order``."""
        top = float(self.most**order)
        if self.sigma == 0:
            return float(min(self.median, self.most)) ** order
        middle, width = math.log(self.median), self.sigma
        place = (math.log(self.most) - middle) / width
        whole = math.exp(order * middle + (order * width) ** 2 / 2)
        below = whole * _NORMAL.cdf(place - order * width)
        return below + top * (1 - _NORMAL.cdf(place))

    @property
    def mean(self) -> float:
        """Of an answer."""
        return self.moment(1)

    @property
    def held(self) -> float:
        """Tokens that a slot holds on average while it decodes: its prompt, half an answer.

        Not half of the mean: a slot is longer with a long answer (the paradox of inspection).
        """
        return self.prompt + self.moment(2) / (2 * self.mean)

    @property
    def document_tokens(self) -> int:
        """What attention in a pack reaches over: the mean square over the mean, prompt and all."""
        p = self.prompt
        squares = p * p + 2 * p * self.mean + self.moment(2)
        return round(squares / (p + self.mean))

    def draw(self, seed: str) -> int:
        """The length of the answer of that name, from 1."""
        drawn = random.Random(seed).lognormvariate(math.log(self.median), self.sigma)
        return max(1, min(self.most, round(drawn)))
