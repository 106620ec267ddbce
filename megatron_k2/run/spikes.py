"""A loss that jumps: what counts as one.

The report saw no spike in 15.5T tokens (section 2.1, figure 3) and gives no rule for one, so the
rule here is ours: upwards only, against the running median, by more than a number of nats and by
more than the noise of the window. It is a function of the losses before it alone.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 64
"""Losses before a step that it is compared with."""
MINIMUM = 8
"""Fewer say nothing, and no step is judged."""
LEAST_NATS = 0.5
"""Default height in nats under which nothing is a spike; a choice, the report gives none."""
NUM_MOVES = 5.0
"""Median moves from one loss to the next that noise does not reach: 4.8 standard deviations of
normal noise, whose median move is 0.954 of them. Deviations from the median itself do not measure
noise here: while the loss falls, they are the fall."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss does not continue those before it."""

    iteration: int
    loss: float
    """Loss of the step, nats a token."""
    median: float
    """Median of the losses in the window before it, nats a token."""
    limit: float
    """Nats above the median from which a step is a spike."""

    def __str__(self) -> str:
        return (
            f"step {self.iteration}: loss {self.loss:.4f} is {self.loss - self.median:.3f} nats "
            f"over the median {self.median:.4f} of the steps before it (limit {self.limit:.3f})"
        )


def find_spike(
    iteration: int, loss: float, before: Sequence[float], least_nats: float
) -> Spike | None:
    """The spike that ``loss`` is, or ``None``.

    Args:
        iteration: its step.
        loss: finite; nats a token of the global batch.
        before: up to ``WINDOW`` finite losses before it.
        least_nats: height under which nothing is a spike, however quiet the window.
    """
    if len(before) < MINIMUM:
        return None
    median = statistics.median(before)
    move = statistics.median(abs(b - a) for a, b in itertools.pairwise(before))
    limit = max(least_nats, NUM_MOVES * move)
    return Spike(iteration, loss, median, limit) if loss - median > limit else None
