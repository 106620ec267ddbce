"""Verdicts a second of each domain, and honest neighbours in a hostile mix.

Answers are made from a seed, right and wrong ones in turn, and every verdict is checked. The
hostile mix puts expressions that no algebra finishes, or that take it minutes, among honest
answers, with spinning processes beside them to the load that is asked for: an honest answer that is
not judged right is misjudged.

    python benchmarks/verifiers.py [--seed 0] [--number 400] [--burners 8]
"""

import argparse
import asyncio
import importlib.util
import os
import subprocess
import sys
import time

from harness import machine_lock, print_inputs, print_result

from megatron_k2.gym.admission import ADVERSARIAL
from megatron_k2.gym.mathematics.env import NAME, mathematics
from megatron_k2.gym.protocol import Domain, Outcome, Task
from megatron_k2.gym.registry import generator_named, open_domain
from megatron_k2.gym.workers import Deadline

GENERATORS = {
    "mathematics": ("mathematics/sum_of_fractions", "mathematics/remainder"),
    "logic": ("logic/24", "logic/sudoku", "logic/cryptarithm"),
    "instructions": ("instructions/constraints",),
    "coding": ("coding/rotate", "coding/count_words"),
}
HOSTILE = (
    ("1", "$9^{9^{9^{9}}}$"),
    ("$10^{10^{10}}$", r"\boxed{10^{10^{10}}+1}"),
    ("1", "$" + "(" * 3000 + "$"),
    ("1", r"\boxed{\int_0^1 x^{x^{x^x}} dx}"),
    ("1", r"\boxed{" + "x+" * 900 + "1}"),
    ("1", r"\boxed{1000000!}"),
    ("1", "\\boxed{" * 500),
    ("$x^{100000}-1$", r"\boxed{(x-1)^{100000}}"),
)
HONEST = (
    (r"\frac{1}{2}", r"so \boxed{0.5}"),
    ("(x+1)^2", r"\boxed{x^2+2x+1}"),
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}"),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}"),
)


type Judged = tuple[Task, str, Outcome]
"""A task, an answer, and what must be found of it."""


def generated(names: tuple[str, ...], number: int, seed: int) -> list[Judged]:
    """Right and adversarial answers in turn."""
    pairs: list[Judged] = []
    for name in names:
        generator = generator_named(name)
        for place, task in enumerate(generator.sample(-(-number // len(names)), seed)):
            answer = ADVERSARIAL[place % 4] if place % 2 else generator.oracle(task)
            pairs.append((task, answer, Outcome.WRONG if place % 2 else Outcome.RIGHT))
    return pairs


def algebra(number: int) -> list[Judged]:
    """Forms that are equal by algebra alone, and in turn forms of something else."""
    pairs: list[Judged] = []
    for place in range(number):
        gold, answer = HONEST[1 + place % 3]
        other = HONEST[1 + (place + 1) % 3][1]
        task = Task(NAME, "", {"reference": gold})
        pairs.append(
            (task, other if place % 2 else answer, Outcome.WRONG if place % 2 else Outcome.RIGHT)
        )
    return pairs


async def rate(domain: Domain, pairs: list[Judged]) -> float:
    """Verdicts a second, after a warm-up; every verdict is checked."""
    warm = pairs[: 4 * (os.cpu_count() or 1)]
    await asyncio.gather(*(domain.judge(task, answer) for task, answer, _ in warm))
    began = time.perf_counter()
    verdicts = await asyncio.gather(*(domain.judge(task, answer) for task, answer, _ in pairs))
    seconds = time.perf_counter() - began
    misjudged = [
        (verdict, pair)
        for verdict, pair in zip(verdicts, pairs, strict=True)
        if verdict.outcome is not pair[2]
    ]
    assert not misjudged, misjudged[0]
    return len(pairs) / seconds


async def hostile_mix(num_burners: int) -> tuple[int, int, float]:
    """Honest answers judged right, how many there were, and the load at the end."""
    spin = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(spin) for _ in range(num_burners)]
    domain = mathematics(deadline=Deadline(cpu_seconds=3, wall_seconds=300))
    pairs = [pair for bad in HOSTILE for pair in (bad, *HONEST)]
    try:
        tasks = [(Task(NAME, "", {"reference": gold}), answer) for gold, answer in pairs]
        verdicts = await asyncio.gather(*(domain.judge(*pair) for pair in tasks))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
        await domain.close()
    honest = [v for n, v in enumerate(verdicts) if n % (1 + len(HONEST))]
    right = sum(verdict.outcome is Outcome.RIGHT for verdict in honest)
    return right, len(honest), os.getloadavg()[0]


async def measured(options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    figures: dict[str, object] = {}
    for label, names in GENERATORS.items():
        if label in options.leave_out:
            continue
        name = names[0].partition("/")[0]
        domain = await open_domain(name, sandbox=options.sandbox, tell=print)
        number = options.number // 8 if name == "coding" else options.number
        figures[f"{label}_per_s"] = await rate(domain, generated(names, number, options.seed))
        if name == NAME:
            figures["algebra_per_s"] = await rate(domain, algebra(number))
        await domain.close()
    if "mix" not in options.leave_out:
        right, number, load = await hostile_mix(options.burners)
        figures |= {"honest_right": right, "honest": number, "load": load}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=400, help="verdicts of a domain")
    parser.add_argument("--burners", type=int, default=8, help="processes that spin beside the mix")
    parser.add_argument("--sandbox", help="back-end for programs")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if importlib.util.find_spec("math_verify") is None:
        options.leave_out += ["mathematics", "mix"]
    with machine_lock():
        print_inputs(**vars(options))
        figures = asyncio.run(measured(options))
        print_result(**figures)


if __name__ == "__main__":
    main()
