"""The domain of instruction following: ``reference`` has ``constraints`` and ``topic``."""

from megatron_k2.gym.checked import CheckedDomain
from megatron_k2.gym.workers import Deadline

NAME = "instructions"
CHECK = "megatron_k2.gym.instructions.check:check"


def instructions(num_workers: int | None = None, deadline: Deadline | None = None) -> CheckedDomain:
    """Constraints checked by code, claims of compliance set aside."""
    return CheckedDomain(NAME, CHECK, num_workers=num_workers, deadline=deadline)
