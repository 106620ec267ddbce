"""Questions with answers that are known by how they are made."""

import random
from collections.abc import Callable
from fractions import Fraction

from megatron_k2.gym.drawn import DrawnGenerator
from megatron_k2.gym.mathematics.env import NAME
from megatron_k2.gym.protocol import Task

ASK = "\nGive the final answer in \\boxed{}."


def _sum_of_fractions(order: random.Random) -> tuple[str, str]:
    a, b = (Fraction(order.randint(1, 20), order.randint(2, 20)) for _ in range(2))
    return f"Compute {a} + {b} as a fraction in lowest terms.", str(a + b)


def _quadratic(order: random.Random) -> tuple[str, str]:
    roots = sorted(order.sample(range(-12, 13), 2))
    b, c = -sum(roots), roots[0] * roots[1]
    question = f"Give the set of all real x with x^2 {b:+d}x {c:+d} = 0."
    return question, rf"\{{{roots[0]}, {roots[1]}\}}"


def _expansion(order: random.Random) -> tuple[str, str]:
    a, b = order.randint(2, 9), order.choice([*range(-9, 0), *range(1, 10)])
    return f"Expand ({a}x {b:+d})^2.", f"{a * a}x^2 {2 * a * b:+d}x {b * b:+d}"


def _speed(order: random.Random) -> tuple[str, str]:
    hours, speed = order.randint(2, 9), order.randint(3, 30) * 4
    question = f"A train needs {hours} hours for {hours * speed} km. What is its mean speed?"
    return question, f"{speed} km/h"


def _remainder(order: random.Random) -> tuple[str, str]:
    base, power, modulus = order.randint(2, 40), order.randint(5, 60), order.randint(7, 97)
    question = f"What is the remainder of {base}^{power} divided by {modulus}?"
    return question, str(pow(base, power, modulus))


FORMS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sum_of_fractions": _sum_of_fractions,
    "quadratic": _quadratic,
    "expansion": _expansion,
    "mean_speed": _speed,
    "remainder": _remainder,
}


class MathematicsGenerator(DrawnGenerator):
    """One form of question, with numbers drawn."""

    domain = NAME

    def _made(self, order: random.Random) -> Task:
        question, answer = FORMS[self._form](order)
        return Task(NAME, question + ASK, {"reference": answer}, source=self.name)

    def oracle(self, task: Task) -> str:
        """The reference, in a box."""
        return f"\\boxed{{{task.reference['reference']}}}"
