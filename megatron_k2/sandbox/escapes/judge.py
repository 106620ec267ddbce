"""Whether a sandbox held against one program, and the whole suite against one back-end."""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_k2.sandbox.escapes.read import Escape
from megatron_k2.sandbox.escapes.scene import Scene
from megatron_k2.sandbox.interpreter import as_input, waiting_python
from megatron_k2.sandbox.protocol import MEBIBYTE, Backend, Limits, Result

REFUSALS = ("no", "blocked", "denied", "failed", "error", "escaped")
"""First words of an allowed program's last line by which it says that it was hindered."""
SENTRIES = ("kill_victim",)
"""Who gets out here makes the programs below this process's end, and are not run."""
REACHES = ("kill_everything", "kill_parent", "stop_parent", "kill_parent_group")
INPUT = b"input for the program"

GENEROUS = Limits(cpu_seconds=10, wall_seconds=60, num_processes=16, disk_bytes=16 * MEBIBYTE)
NARROW = Limits(cpu_seconds=1, wall_seconds=4, num_processes=16, disk_bytes=16 * MEBIBYTE)
"""Of programs that must be killed: they always take all the time they are given."""


@dataclass(frozen=True)
class Verdict:
    """Of one program in one back-end."""

    name: str
    must: str
    has_held: bool
    why: str
    """What happened; where it did not hold, how it got out."""


def judge(escape: Escape, result: Result, reached: str) -> Verdict:
    """Whether what must happen has.

    Args:
        escape: the program.
        result: of its run.
        reached: what of the scene it reached, ``""`` if nothing.
    """
    said = result.last_line
    happened = result.reason or f"exit code {result.exit_code}, {said[:60]!r}"
    first_word = said.split()[0].strip(".,:;!").casefold() if said else ""
    if reached or first_word == "escaped":
        return Verdict(escape.name, escape.must, False, reached or f"it says {said[:60]!r}")
    if escape.must == "killed":
        has_held = not result.is_success
    elif escape.must == "allowed":
        has_held = result.is_success and bool(said) and first_word not in REFUSALS
        happened += "" if has_held else f": {result.stderr[-200:].decode('utf-8', 'replace')}"
    else:
        has_held = True
    return Verdict(escape.name, escape.must, has_held, happened)


async def try_escape(backend: Backend, escape: Escape) -> Verdict:
    """Run one program in a box and a scene of its own."""
    limits = NARROW if escape.must == "killed" else GENEROUS
    with Scene() as scene:
        async with backend.open(limits) as box:
            result = await box.run(
                waiting_python(),
                stdin=as_input(escape.code, INPUT),
                environment=scene.environment,
            )
        return judge(escape, result, await asyncio.to_thread(scene.escape_of, result))


async def try_all(
    backend: Backend,
    escapes: Sequence[Escape],
    tell: Callable[[int], None] = lambda _: None,
) -> list[Verdict]:
    """All programs, a few at a time; ``tell`` is called with how many are done.

    Where a program can kill a stranger, those that would kill this process count as escaped.
    """
    free = asyncio.Semaphore(2 * (os.cpu_count() or 1))
    found: dict[str, Verdict] = {}

    async def one(escape: Escape) -> None:
        async with free:
            found[escape.name] = await try_escape(backend, escape)
            tell(len(found))

    first = [each for each in escapes if each.name in SENTRIES]
    await asyncio.gather(*map(one, first))
    rest = [each for each in escapes if each.name not in found]
    if not all(verdict.has_held for verdict in found.values()):
        for each in [each for each in rest if each.name in REACHES]:
            found[each.name] = Verdict(each.name, each.must, False, "not run: it would end us")
        rest = [each for each in rest if each.name not in found]
    await asyncio.gather(*map(one, rest))
    return [found[each.name] for each in escapes]
