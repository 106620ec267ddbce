"""The domain of mathematics: ``reference`` is the right answer as text or LaTeX."""

from megatron_k2.gym.checked import CheckedDomain
from megatron_k2.gym.workers import Deadline

NAME = "mathematics"
CHECK = "megatron_k2.gym.mathematics.check:check"


def mathematics(num_workers: int | None = None, deadline: Deadline | None = None) -> CheckedDomain:
    """Final answers compared exactly as numbers with units, else by math-verify."""
    warm_up = {"reference": r"\sqrt{8}", "answer": r"\boxed{2\sqrt{2}}"}
    return CheckedDomain(NAME, CHECK, num_workers=num_workers, deadline=deadline, warm_up=warm_up)
