"""Cases that solutions agree on are kept; problems on which they do not are refused by name."""

import asyncio

import pytest

from megatron_k2.errors import UserError
from megatron_k2.gym.coding.env import Coding
from megatron_k2.gym.coding.made_tests import made_tests
from megatron_k2.gym.protocol import Outcome, Task

RIGHT = "print(sum(map(int, input().split())))"
ALSO = "a = [int(x) for x in input().split()]\nt = 0\nfor x in a: t += x\nprint(t)\n"
WRONG = "print(max(map(int, input().split())))"
RAISES = "raise SystemExit(1)"
INPUTS = [b"1 2\n", b"5\n", b"7 7 7\n", b"10 -3\n", b"1 2\n"]


def made(backend, solutions, inputs=INPUTS):
    return asyncio.run(made_tests(Coding(backend), solutions, inputs))


def test_cases_are_what_most_solutions_say(backend):
    found = made(backend, [RIGHT] * 5 + [ALSO] * 4 + [WRONG])
    assert found.reason == ""
    assert found.num_inputs == 4
    assert {test["stdout"] for test in found.tests} == {"3", "5", "21", "7"}
    task = Task("coding", "add", {"kind": "stdio", "tests": list(found.tests)})

    async def judged():
        domain = Coding(backend)
        answers = (f"```python\n{each}\n```" for each in (ALSO, WRONG, "print(3)"))
        return [(await domain.judge(task, each)).outcome for each in answers]

    assert asyncio.run(judged()) == [Outcome.RIGHT, Outcome.WRONG, Outcome.WRONG]


@pytest.mark.parametrize(
    ("solutions", "inputs", "reason"),
    [
        ([RIGHT] * 8 + [WRONG] * 2, INPUTS, "8 of 10 solutions pass all"),
        ([RIGHT] * 5 + [WRONG] * 5, [b"1 2\n", b"3 4\n"], "agree on none"),
        ([RAISES] * 10, INPUTS, "agree on none"),
        ([RIGHT] * 10, [b"1 2\n", b"3 0\n"], "a constant would pass"),
        ([RIGHT] * 10, [], "agree on none"),
    ],
)
def test_problems_that_are_not_kept(backend, solutions, inputs, reason):
    assert reason in made(backend, solutions, inputs).reason


def test_one_solution_agrees_with_itself_and_is_refused(backend):
    with pytest.raises(UserError, match="expected 2 or more"):
        made(backend, [RIGHT])
