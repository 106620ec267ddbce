"""Domains and generators by name; a domain's packages load when it is opened."""

import difflib
import functools
import importlib
from collections.abc import Callable, Iterable
from typing import cast

from megatron_k2.errors import UserError
from megatron_k2.fidelity.statements import Asker
from megatron_k2.gym.coding import env as coding
from megatron_k2.gym.coding import generators as coding_generators
from megatron_k2.gym.faithfulness import env as faithfulness
from megatron_k2.gym.faithfulness import generators as faithfulness_generators
from megatron_k2.gym.instructions import coded, nuance
from megatron_k2.gym.instructions import env as instructions
from megatron_k2.gym.instructions.generators import InstructionGenerator
from megatron_k2.gym.logic import env as logic
from megatron_k2.gym.logic import reasoning_gym
from megatron_k2.gym.mathematics import env as mathematics
from megatron_k2.gym.mathematics import generators as mathematics_generators
from megatron_k2.gym.protocol import Domain, Generator
from megatron_k2.gym.safety import env as safety
from megatron_k2.gym.safety.generators import SafetyGenerator
from megatron_k2.gym.swe import env as swe
from megatron_k2.gym.swe import generators as swe_generators
from megatron_k2.gym.tool_use import env as tool_use
from megatron_k2.gym.tool_use import generators as tool_use_generators
from megatron_k2.gym.workers import Deadline
from megatron_k2.sandbox.choose import backend_named, default_backend
from megatron_k2.sandbox.protocol import Limits

CHECKED = {
    mathematics.NAME: (mathematics.mathematics, "final answers: fractions, units, LaTeX"),
    logic.NAME: (logic.logic, "24, sudoku, cryptarithms, Morse, tables; reasoning-gym's puzzles"),
    instructions.NAME: (instructions.instructions, "constraints that code checks"),
}
SANDBOXED: dict[str, tuple[Callable[..., Domain], str]] = {
    coding.NAME: (coding.Coding, "programs: standard output, functions, tests; in a sandbox"),
    coded.NAME: (coded.CodedInstructions, "instructions whose checker is a program; in a sandbox"),
    swe.NAME: (swe.Swe, "repositories mended by an edit; tests in a sandbox"),
}
ASKED: dict[str, tuple[Callable[[Asker | None], Domain], str]] = {
    faithfulness.NAME: (faithfulness.Faithfulness, "every sentence of an answer in its context"),
    nuance.NAME: (nuance.Nuance, "constraints that code checks, and points that a model judges"),
    safety.NAME: (safety.Safety, "harmful requests declined, benign twins served"),
}
"""Judged by a model where there is one, by rules as far as they go without."""
DOMAINS = {
    **{name: sentence for name, (_, sentence) in (CHECKED | SANDBOXED | ASKED).items()},
    tool_use.NAME: "calls of tools on a calendar, judged by the state they leave",
}


def nearest(name: str, known: list[str], what: str) -> UserError:
    """The error of a name that is not known, with one like it."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
    return UserError(f"no {what} {name!r}; {hint}")


async def open_domain(
    name: str,
    *,
    num_workers: int | None = None,
    deadline: Deadline | None = None,
    sandbox: str | None = None,
    asker: Asker | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Domain:
    """A domain, ready to judge.

    Args:
        name: one of ``DOMAINS``; or ``module:factory`` of the caller's own, called without
            arguments.
        num_workers: processes, or programs at one time.
        deadline: of a verdict; of one run, for programs.
        sandbox: back-end by name; the strongest that passes its suite by default.
        asker: a model that judges, for the domains that ask one.
        tell: is called with what takes time.

    Raises:
        UserError: no such domain; no sandbox for one that needs it.
    """
    if ":" in name:
        return _of_module(name)
    if name in ASKED:
        return ASKED[name][0](asker)
    if name in CHECKED:
        return CHECKED[name][0](num_workers, deadline)
    if name == tool_use.NAME:
        return tool_use.ToolUse()
    if name not in SANDBOXED:
        raise nearest(name, list(DOMAINS), "domain")
    backend = backend_named(sandbox) if sandbox else await default_backend(tell)
    limits = Limits(deadline.cpu_seconds, deadline.wall_seconds) if deadline else None
    return SANDBOXED[name][0](backend, limits, num_slots=num_workers)


def _of_module(name: str) -> Domain:
    module, _, factory = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, ValueError, TypeError) as problem:
        raise UserError(
            f"domain {name!r}: {problem}; expected MODULE:FACTORY of a module that Python finds "
            "(PYTHONPATH), called without arguments"
        ) from None
    if missing := [each for each in ("judge", "environment", "close") if not hasattr(found, each)]:
        raise UserError(f"domain {name!r} has no {missing[0]!r}; see gym/protocol.py")
    return cast(Domain, found)


def generators() -> dict[str, Callable[[], Generator]]:
    """Makers of all generators that can be used here, by name."""
    makers: list[tuple[str, Callable[[str], Generator], Iterable[str]]] = [
        (
            mathematics.NAME,
            mathematics_generators.MathematicsGenerator,
            mathematics_generators.FORMS,
        ),
        (logic.NAME, logic.PuzzleGenerator, logic.MAKERS),
        (coding.NAME, coding_generators.CodingGenerator, coding_generators.FORMS),
        (swe.NAME, swe_generators.SweGenerator, swe_generators.FORMS),
        (
            faithfulness.NAME,
            faithfulness_generators.FaithfulnessGenerator,
            faithfulness_generators.FORMS,
        ),
        (
            tool_use.NAME,
            tool_use_generators.ToolUseGenerator,
            () if tool_use.missing() else tool_use_generators.FORMS,
        ),
        ("reasoning_gym", reasoning_gym.ReasoningGymGenerator, reasoning_gym.names()),
    ]
    found: dict[str, Callable[[], Generator]] = {
        InstructionGenerator.name: InstructionGenerator,
        SafetyGenerator.name: SafetyGenerator,
    }
    for prefix, maker, forms in makers:
        found |= {f"{prefix}/{form}": functools.partial(maker, form) for form in forms}
    return found


def generator_named(name: str) -> Generator:
    """A generator.

    Raises:
        UserError: no such name, or its package is not installed.
    """
    for prefix, missing in (
        ("reasoning_gym", reasoning_gym.missing),
        ("tool_use", tool_use.missing),
    ):
        if name.startswith(f"{prefix}/") and (problem := missing()):
            raise UserError(problem)
    known = generators()
    if name not in known:
        raise nearest(name, list(known), "generator")
    return known[name]()
