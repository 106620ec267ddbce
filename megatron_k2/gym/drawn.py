"""Generators whose tasks are drawn one after another from one seed."""

import random
from abc import ABC, abstractmethod

from megatron_k2.gym.protocol import Generator, Task


class DrawnGenerator(Generator, ABC):
    """One form of a domain's tasks; each draws another.

    Args:
        form: its name within the domain.
    """

    def __init__(self, form: str) -> None:
        self.name = f"{self.domain}/{form}"
        self._form = form

    def sample(self, number: int, seed: int) -> list[Task]:
        """Tasks drawn from (seed, form)."""
        order = random.Random(f"{seed}/{self.name}")
        return [self._made(order) for _ in range(number)]

    @abstractmethod
    def _made(self, order: random.Random) -> Task:
        """The next task."""
