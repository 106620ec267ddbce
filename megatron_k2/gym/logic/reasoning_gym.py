"""reasoning-gym's generators and scorers (Apache-2.0), each behind an admission card.

A scorer needs the whole entry that made the question. It is made again from name, seed and place
in the worker, so that a task is small and says how it came to be. A score below 1 is wrong: their
scorers give parts of a point for form alone.
"""

import contextlib
import functools
import importlib.util
import sys
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.protocol import Task

NAME = "logic"
FORM = "\nAnswer with the result alone."


def missing() -> str | None:
    """Why it cannot be used, and the way out."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return "reasoning-gym is not installed: pip install 'megatron-k2[gym]'"
    return None


def names() -> list[str]:
    """Of all its generators; none where it is not installed."""
    if missing():
        return []
    import reasoning_gym  # noqa: F401 - fills the table
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def _made(generator: str, size: int, seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(generator, size=size, seed=seed)


_dataset = functools.lru_cache(maxsize=8)(_made)


@functools.lru_cache(maxsize=4096)
def _entry(generator: str, size: int, seed: int, index: int) -> Any:
    # Some take half a second to make an entry.
    with contextlib.redirect_stdout(sys.stderr):  # one of them prints while it makes an entry
        return _dataset(generator, size, seed)[index]


def check(generator: str, size: int, seed: int, index: int, answer: str) -> dict[str, Any]:
    """The scorer's verdict, as JSON."""
    entry = _entry(generator, size, seed, index)
    score = float(_dataset(generator, size, seed).score_answer(answer.strip(), entry))
    return {"outcome": "right" if score == 1 else "wrong", "evidence": f"score {score:g}"}


class ReasoningGymGenerator:
    """One of its generators, at its default settings.

    Raises:
        UserError: reasoning-gym is not installed.
    """

    domain = NAME

    def __init__(self, generator: str) -> None:
        if problem := missing():
            raise UserError(problem)
        self.name = f"reasoning_gym/{generator}"
        self._generator = generator

    def sample(self, number: int, seed: int) -> list[Task]:
        """``number`` of its questions."""
        # Made anew: that a seed gives the same questions is for the card to find out.
        data = _made(self._generator, number, seed)
        where = {"generator": self._generator, "size": number, "seed": seed}
        with contextlib.redirect_stdout(sys.stderr):
            entries = [data[index] for index in range(number)]
        return [
            Task(
                NAME,
                entry["question"] + FORM,
                {"kind": "reasoning_gym", "facts": {**where, "index": index}},
                source=self.name,
            )
            for index, entry in enumerate(entries)
        ]

    def oracle(self, task: Task) -> str:
        """The answer its entry holds."""
        return str(_entry(**task.reference["facts"])["answer"])
