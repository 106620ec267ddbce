"""Small programming tasks whose tests are made by their own solution."""

import random
from collections.abc import Callable
from typing import Any

from megatron_k2.gym.coding.env import NAME
from megatron_k2.gym.drawn import DrawnGenerator
from megatron_k2.gym.protocol import Task

type Form = tuple[str, str, Callable[[random.Random], list[Any]]]

FORMS: dict[str, Form] = {
    "running_maximum": (
        "Write `running_maximum(values)`: the largest value so far, at each place of a list.",
        "    found = []\n    for v in values:\n"
        "        found.append(max(v, found[-1]) if found else v)\n    return found\n",
        lambda r: [[r.randint(-99, 99) for _ in range(r.randint(0, 8))]],
    ),
    "count_words": (
        "Write `count_words(values)`: a dict of how often each word of a list of words occurs.",
        "    found = {}\n    for v in values:\n        found[v] = found.get(v, 0) + 1\n"
        "    return found\n",
        lambda r: [[r.choice("ab cd ef gh".split()) for _ in range(r.randint(0, 9))]],
    ),
    "rotate": (
        "Write `rotate(values)`: the list `values[0]`, moved left by `values[1]` places, round.",
        "    items, n = values\n    n = n % len(items) if items else 0\n"
        "    return items[n:] + items[:n]\n",
        lambda r: [[[r.randint(0, 9) for _ in range(r.randint(1, 7))], r.randint(0, 20)]],
    ),
    "is_balanced": (
        "Write `is_balanced(values)`: whether the brackets ()[] of a text close in order.",
        "    stack = []\n    for c in values:\n        if c in '([':\n            stack.append(c)\n"
        "        elif not stack or stack.pop() + c not in ('()', '[]'):\n            return False\n"
        "    return not stack\n",
        lambda r: ["".join(r.choice("()[]") for _ in range(r.choice((0, 2, 2, 4)))) or "([])"],
    ),
}
NUM_TESTS = 6


class CodingGenerator(DrawnGenerator):
    """One form of task; each draws other arguments."""

    domain = NAME

    def _made(self, order: random.Random) -> Task:
        asked, _, draw = FORMS[self._form]
        space: dict[str, Any] = {}
        exec(self._solution(), space)  # ours, from the table above
        arguments = [draw(order) for _ in range(NUM_TESTS)]
        tests = [{"arguments": a, "expected": space[self._form](*a)} for a in arguments]
        reference = {"kind": "function", "entry": self._form, "tests": tests}
        first = tests[0]
        shown = f"{self._form}({first['arguments'][0]!r}) gives {first['expected']!r}"
        return Task(NAME, f"{asked}\nExample: {shown}.", reference, source=self.name)

    def _solution(self) -> str:
        return f"def {self._form}(values):\n{FORMS[self._form][1]}"

    def oracle(self, task: Task) -> str:
        """The form's solution, fenced."""
        return f"```python\n{self._solution()}```"
