"""The domain of software engineering: an edit of a repository, judged by tests it does not see.

``reference``: ``files`` by path, ``imports`` that the tests begin with, ``fail_to_pass`` and
``pass_to_pass`` of ``call``, an expression, and ``expected``, its plain value. Both lists must pass
whole; a test without a value has failed. The box holds the edited files and nothing else: no test,
no expected value, no history, and values are compared outside it.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_k2.gym.coding.env import OverPrograms, of_value
from megatron_k2.gym.coding.plain import encode
from megatron_k2.gym.judging import NotJudged
from megatron_k2.gym.protocol import (
    Environment,
    SingleTurn,
    Step,
    Task,
    Verdict,
    right,
    unknown,
    wrong,
)
from megatron_k2.gym.swe.edits import NoEdit, edited
from megatron_k2.gym.swe.episode import TOOLS, SweEpisode
from megatron_k2.records.messages import Message
from megatron_k2.sandbox.interpreter import readable_roots

NAME = "swe"
ENTRY = "value_of"
LISTS = ("fail_to_pass", "pass_to_pass")


def harness(imports: str) -> str:
    """A program that evaluates expressions of ours over the repository in its folder."""
    return (
        "import os, sys\nsys.path.insert(0, os.getcwd())\n_space = {}\n"
        f"def {ENTRY}(expression):\n    if not _space:\n"
        f"        exec({imports!r}, _space)\n    return eval(expression, _space)\n"
    )


class Swe(OverPrograms):
    """Runs edited repositories in a sandbox."""

    name = NAME

    def environment(self) -> Environment:
        """One answer; in turns, with tools, where the task has them (``in_turns``)."""
        return _ByTask(SingleTurn(self), SweEpisode(self._programs, self._judged_files))

    async def _judged(self, task: Task, answer: str) -> Verdict:
        try:
            return await self._tested(task.reference, edited(task.reference["files"], answer))
        except NoEdit as problem:
            return wrong(str(problem))

    async def _judged_files(self, task: Task, files: Mapping[str, str]) -> Verdict:
        try:
            return await self._tested(task.reference, files)
        except NotJudged as problem:
            return unknown(str(problem))

    async def _tested(self, facts: Mapping[str, Any], files: Mapping[str, str]) -> Verdict:
        tests = [test for name in LISTS for test in facts[name]]
        if not facts["fail_to_pass"]:
            return unknown("the reference has no test that fails before")
        whole = tuple(path for path, text in facts["files"].items() if text)
        if found := readable_original(whole):
            return unknown(f"programs of the sandbox can read the original, {found}; use an "
                           "interpreter whose base has no site-packages")  # fmt: skip
        content = {path: text.encode("utf-8", "replace") for path, text in files.items()}
        calls = [encode([test["call"]]) for test in tests]
        said = await self._programs.values(harness(facts["imports"]), ENTRY, calls, content)
        found_all = [of_value(t["expected"], each) for t, each in zip(tests, said, strict=True)]
        number = len(facts["fail_to_pass"])
        return _verdict(tests, {LISTS[0]: found_all[:number], LISTS[1]: found_all[number:]})


def in_turns(task: Task) -> Task:
    """A task to be worked on with tools instead of answered at once."""
    prompt = f"{task.prompt}\n\nOr mend it with the tools, and submit; then no block is needed."
    return dataclasses.replace(task, prompt=prompt, tools=TOOLS)


class _ByTask:
    """The environment of a task that has tools, or of one that has none."""

    def __init__(self, once: Environment, turns: Environment) -> None:
        self._once, self._turns = once, turns
        self._chosen = once

    async def reset(self, task: Task) -> Step:
        self._chosen = self._turns if task.tools else self._once
        return await self._chosen.reset(task)

    async def step(self, action: Message) -> Step:
        return await self._chosen.step(action)

    async def verify(self) -> Verdict:
        return await self._chosen.verify()


def _verdict(tests: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> Verdict:
    counts = {name: sum(each["is_right"] for each in items) for name, items in found.items()}
    said = ", ".join(f"{name} {counts[name]} of {len(found[name])}" for name in LISTS)
    every = [each for name in LISTS for each in found[name]]
    failed = [(t, each) for t, each in zip(tests, every, strict=True) if not each["is_right"]]
    if not failed:
        return right(said, **found)
    test, each = failed[0]
    return wrong(f"{said}; {test['call'][:100]}: {each['why']}"[:400], **found)


@functools.cache
def readable_original(paths: tuple[str, ...]) -> str | None:
    """A copy of a repository's file among what programs can read: a fix to import, not to write."""
    for root in readable_roots():
        if os.path.islink(root):
            continue
        for folder, _, _ in os.walk(root):
            for path in paths:
                if os.path.isfile(os.path.join(folder, path)):
                    return str(Path(folder, path))
    return None
