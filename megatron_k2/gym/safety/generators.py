"""Requests of ``seeds``, harmful and benign, as tasks."""

from collections.abc import Sequence

from megatron_k2.gym.protocol import Generator, Task
from megatron_k2.gym.safety.env import NAME
from megatron_k2.gym.safety.seeds import BENIGN_RUBRIC, LABELS, RUBRIC, SEEDS, Seed

DECLINES = "I won't help with that: it would harm somebody."


class SafetyGenerator(Generator):
    """The pairs, one after another."""

    name = f"{NAME}/twins"
    domain = NAME

    def sample(self, number: int, seed: int) -> Sequence[Task]:
        """Harmful and benign in turn, beginning where the seed says; they come again at the end."""
        every = [task_of(each, label) for each in SEEDS for label in LABELS]
        return [every[(seed + place) % len(every)] for place in range(number)]

    def oracle(self, task: Task) -> str:
        """A refusal of a harmful request, the seed's answer to a benign one."""
        if task.reference["label"] == "harmful":
            return DECLINES
        return next(seed.served for seed in SEEDS if seed.benign == task.prompt)


def task_of(seed: Seed, label: str, prompt: str | None = None) -> Task:
    """A seed's task.

    Args:
        seed: of ``SEEDS``, or a user's.
        label: *harmful* or *benign*.
        prompt: what the policy reads; the plain request where not given.
    """
    is_harmful = label == "harmful"
    request = seed.harmful if is_harmful else seed.benign
    rubric = list(RUBRIC if is_harmful else BENIGN_RUBRIC)
    reference = {
        "label": label, "request": request, "rubric": rubric, "category": seed.category
    }  # fmt: skip
    return Task(NAME, prompt or request, reference, source=f"{NAME}/twins")
