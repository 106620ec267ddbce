"""The domain of logic: a puzzle of ours, or one of reasoning-gym's, by its ``kind``."""

import random
from collections.abc import Callable
from typing import Any

from megatron_k2.gym.checked import CheckedDomain
from megatron_k2.gym.logic import puzzles, readings, reasoning_gym
from megatron_k2.gym.protocol import Task
from megatron_k2.gym.workers import Deadline

NAME = reasoning_gym.NAME
CHECK = "megatron_k2.gym.logic.env:check"


CHECKS: dict[str, Callable[..., puzzles.Found]] = {**puzzles.CHECKS, **readings.CHECKS}
MAKERS = {**puzzles.MAKERS, **readings.MAKERS}


def check(kind: str, facts: dict[str, Any], answer: str) -> dict[str, Any]:
    """The verdict of one answer, as JSON."""
    if kind == "reasoning_gym":
        return reasoning_gym.check(**facts, answer=answer)
    return CHECKS[kind](**facts, answer=answer)


def logic(num_workers: int | None = None, deadline: Deadline | None = None) -> CheckedDomain:
    """Puzzles, each with its own checker."""
    return CheckedDomain(NAME, CHECK, num_workers=num_workers, deadline=deadline)


class PuzzleGenerator:
    """One kind of puzzle, and the solution it was made from."""

    domain = NAME

    def __init__(self, kind: str) -> None:
        self.name = f"{NAME}/{kind}"
        self._kind = kind

    def sample(self, number: int, seed: int) -> list[Task]:
        """Puzzles drawn from (seed, kind, place)."""
        return [self._made(seed, place)[0] for place in range(number)]

    def _made(self, seed: int, place: int) -> tuple[Task, str]:
        maker = MAKERS[self._kind]
        prompt, facts, solution = maker(random.Random(f"{seed}/{self.name}/{place}"))
        reference = {"kind": self._kind, "facts": facts}
        return Task(
            NAME, prompt, reference, id=f"{self._kind}-{seed}-{place}", source=self.name
        ), solution

    def oracle(self, task: Task) -> str:
        """The solution the puzzle was made from."""
        seed, place = task.id.rsplit("-", 2)[1:]
        return self._made(int(seed), int(place))[1]
