"""Tests for problems that have none: made inputs, kept where known solutions agree on their output.

As Kimi k1.5 describes (arXiv:2501.12599, section 2.3.2): many inputs are generated for a problem,
ten solutions that were accepted are run on each; a case is valid where at least seven give the same
output, and the problem is kept where at least nine of the ten pass every valid case. Its inputs
come from a generator that a model programs; here they are whatever the caller gives.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.errors import UserError
from megatron_k2.gym.coding.env import Coding

LEAST_AGREEING, LEAST_PASSING = 0.7, 0.9
"""Shares of the solutions; k1.5's seven and nine of ten."""


@dataclass(frozen=True)
class MadeTests:
    """What became of a problem's inputs."""

    tests: tuple[dict[str, str], ...]
    """``stdin`` and ``stdout`` of each valid case, as the coding domain takes them."""
    num_inputs: int
    reason: str = ""
    """Why the problem is not kept; empty: it is."""


async def made_tests(
    programs: Coding, solutions: Sequence[str], inputs: Sequence[bytes]
) -> MadeTests:
    """Valid cases of a problem of standard input and output.

    Args:
        programs: runs programs in its sandbox.
        solutions: Python programs that are known to be right, most of them.
        inputs: made ones; the same twice is one.

    Raises:
        UserError: fewer than two solutions, whose agreement would say nothing.
    """
    if len(solutions) < 2:
        raise UserError(f"{len(solutions)} solutions: expected 2 or more, which may disagree")
    distinct = list(dict.fromkeys(inputs))
    calls = [programs.output(solution, each) for each in distinct for solution in solutions]
    said = await asyncio.gather(*calls)
    width = len(solutions)
    table = [said[place * width : (place + 1) * width] for place in range(len(distinct))]
    tests, passes = [], [0] * width
    for given, outputs in zip(distinct, table, strict=True):
        known = Counter(each for each in outputs if each is not None)
        output, number = known.most_common(1)[0] if known else ("", 0)
        if number < LEAST_AGREEING * width:
            continue
        tests.append({"stdin": given.decode("utf-8", "replace"), "stdout": output})
        for place, each in enumerate(outputs):
            passes[place] += each == output
    num_passing = sum(each == len(tests) for each in passes)
    reason = ""
    if not tests:
        reason = f"the solutions agree on none of {len(distinct)} inputs"
    elif num_passing < LEAST_PASSING * width:
        reason = f"{num_passing} of {width} solutions pass all {len(tests)} cases"
    elif len({test["stdout"] for test in tests}) < 2:
        reason = "every case has the same output: a constant would pass"
    return MadeTests(tuple(tests), len(distinct), reason)
