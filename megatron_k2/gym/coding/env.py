"""The domain of coding: an answer's program, run on tests it does not see.

``reference`` has a ``kind``. *stdio*: ``tests`` of ``stdin`` and ``stdout``. *function*: ``entry``
and ``tests`` of ``arguments`` and ``expected`` plain values. *tests*: ``entry`` and ``tests``, a
text of assertions, perhaps in a function ``check(candidate)``; ``setup``, where given, defines what
they use beside it.
"""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_k2.gym.coding.harness import CANDIDATE, PROBE, REFEREE, as_line, said_after
from megatron_k2.gym.coding.plain import decode, encode
from megatron_k2.gym.judging import NotJudged, SingleAnswerDomain
from megatron_k2.gym.protocol import Task, Verdict, right, unknown, wrong
from megatron_k2.sandbox.pool import Pool
from megatron_k2.sandbox.protocol import Backend, Limits, Result, Status

NAME = "coding"
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
MOST_ROUNDS = 20
"""Of tests whose arguments depend on the candidate's values."""
FLOAT_TOLERANCE = 1e-9
STARTERS = (b"bwrap: ", b"setpriv: ", b"prlimit: ")
"""How the complaints begin of what stands before the interpreter."""


def program_of(answer: str) -> str:
    """The last fenced block of Python, or of no language; without a fence, all of the answer."""
    blocks = [
        text
        for name, text in FENCE.findall(answer)
        if name.lower() in ("", "py", "python", "python3")
    ]
    return blocks[-1] if blocks else answer


class Coding(SingleAnswerDomain):
    """Runs candidates in a sandbox.

    Args:
        backend: of the sandbox.
        limits: of one run of a candidate.
        num_slots: runs at one time.
    """

    name = NAME

    def __init__(
        self, backend: Backend, limits: Limits | None = None, *, num_slots: int | None = None
    ) -> None:
        self._pool = Pool(backend, limits, num_slots=num_slots)
        self._kinds: dict[str, Callable[..., Awaitable[Verdict]]] = {
            "stdio": self._stdio,
            "function": self._function,
            "tests": self._tests,
        }

    async def _judged(self, task: Task, answer: str) -> Verdict:
        facts = dict(task.reference)
        kind = self._kinds[facts.pop("kind")]
        code = program_of(answer)
        return await kind(code, **facts) if code.strip() else wrong("no program")

    async def _stdio(self, code: str, tests: list[dict[str, str]]) -> Verdict:
        runs = [self._run(code, test["stdin"].encode()) for test in tests]
        results = await asyncio.gather(*runs)
        found = [_of_output(test, run) for test, run in zip(tests, results, strict=True)]
        return all_of(found)

    async def _function(self, code: str, entry: str, tests: list[dict[str, Any]]) -> Verdict:
        calls = [encode(test["arguments"]) for test in tests]
        said = await self.values(code, entry, calls)
        found = [of_value(test["expected"], each) for test, each in zip(tests, said, strict=True)]
        return all_of(found)

    async def _tests(self, code: str, entry: str, tests: str, setup: str = "") -> Verdict:
        given = {"entry": entry, "tests": tests, "setup": setup}
        probe = await self._run(PROBE, as_line(**given))
        probed = said_after("", probe.stdout.strip())
        calls = probed[-1] if probed and isinstance(probed[-1], list) else []
        table: list[tuple[Any, dict[str, Any]]] = []
        for _ in range(MOST_ROUNDS):
            if calls:
                table += zip(calls, await self.values(code, entry, calls), strict=True)
            nonce = secrets.token_hex(16)
            work = as_line(**given, table=table, nonce=nonce)
            run = await self._run(REFEREE, work)
            said = said_after(nonce, run.stdout)
            if not said:
                raise NotJudged(f"the tests did not end: {_how(run)}")
            calls = said[-1]["missing"]
            if not calls:
                error = said[-1]["error"]
                return wrong(error) if error else right("the tests ran to their end")
        raise NotJudged(f"after {MOST_ROUNDS} rounds the tests still ask for more calls")

    async def values(
        self, code: str, entry: str, calls: list[Any], files: dict[str, bytes] | None = None
    ) -> list[dict[str, Any]]:
        """For each call the candidate's plain value, or what became of it.

        Args:
            code: that defines ``entry``.
            entry: the function's name.
            calls: its arguments, encoded (``gym/coding/plain.py``).
            files: of its folder.

        Raises:
            NotJudged: the candidate was not run.
        """
        nonce = secrets.token_hex(16)
        work = as_line(code=code, entry=entry, calls=calls, nonce=nonce)
        run = await self._run(CANDIDATE, work, files)
        ready, *said = said_after(nonce, run.stdout) or [None]
        if ready is None:
            raise NotJudged(f"the candidate's harness did not start: {_how(run)}")
        if said and "failed" in said[0]:
            return [{"raised": said[0]["failed"]}] * len(calls)
        lost = {"raised": f"no value came back: {_how(run)}"}
        return [*said, *[lost] * len(calls)][: len(calls)]

    async def program(self, text: str, files: dict[str, bytes]) -> Result:
        """Run a program of the candidate's over files, for it to read what it says.

        Raises:
            NotJudged: the sandbox does not start.
        """
        return await self._run(text, b"", files)

    async def output(self, code: str, stdin: bytes) -> str | None:
        """What a program prints; ``None`` where it does not end well.

        Raises:
            NotJudged: the sandbox does not start.
        """
        run = await self._run(code, stdin)
        if run.status is not Status.OK or run.exit_code:
            return None
        return "\n".join(_lines(run.stdout.decode("utf-8", "replace")))

    async def _run(
        self, program: str, stdin: bytes, files: dict[str, bytes] | None = None
    ) -> Result:
        """Run a program; again, where the box rather than the program seems to have failed.

        A program may imitate that, and is judged as it is if another one starts.
        """
        run = await self._pool.run(program, stdin, files)
        if run.exit_code == 1 and run.stderr.startswith(STARTERS):
            run = await self._pool.run(program, stdin, files)
        if not (run.exit_code == 1 and run.stderr.startswith(STARTERS)):
            return run
        other = await self._pool.run("print(1)")
        if other.stdout != b"1\n":
            raise NotJudged(f"the sandbox does not start: {_how(run)}")
        return run


def _how(run: Result) -> str:
    last = run.stderr.decode("utf-8", "replace").strip().split("\n")[-1][:200]
    return run.reason or last or f"exit code {run.exit_code}"


def _of_output(test: dict[str, str], run: Result) -> dict[str, Any]:
    if run.status is not Status.OK or run.exit_code:
        return {"is_right": False, "why": _how(run)}
    said = _lines(run.stdout.decode("utf-8", "replace"))
    is_right = said == _lines(test["stdout"])
    return {"is_right": is_right, "why": "" if is_right else f"printed {' / '.join(said)[:200]!r}"}


def _lines(text: str) -> list[str]:
    """Lines without blanks at their ends, or at the end of all."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def of_value(expected: Any, said: dict[str, Any]) -> dict[str, Any]:
    """One test's verdict: what ``Coding.values`` gave, against the value that is expected."""
    if "value" not in said:
        return {"is_right": False, "why": str(said.get("raised"))}
    value = decode(said["value"])
    is_right = _are_same(expected, value)
    return {"is_right": is_right, "why": "" if is_right else f"returned {value!r}"[:200]}


def _are_same(expected: Any, value: Any) -> bool:
    """Equal plain values; a tuple may stand for a list, which JSON has only one of."""
    if isinstance(expected, list | tuple) and isinstance(value, list | tuple):
        pairs = zip(expected, value, strict=False)
        return len(expected) == len(value) and all(_are_same(a, b) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(value, dict):
        same_keys = {str(k): v for k, v in value.items()} if expected else value
        return len(value) == len(expected) == len(expected.keys() & same_keys.keys()) and all(
            _are_same(item, same_keys[key]) for key, item in expected.items()
        )
    if isinstance(expected, bool) or isinstance(value, bool):
        return expected is value
    if isinstance(expected, float) and isinstance(value, int | float):
        return abs(expected - value) <= FLOAT_TOLERANCE * max(1.0, abs(expected))
    return type(expected) is type(value) and bool(expected == value)


def all_of(found: list[dict[str, Any]]) -> Verdict:
    """Right where every test passes; a reference without tests says nothing."""
    if not found:
        return unknown("the reference has no test")
    failed = [(number, test) for number, test in enumerate(found) if not test["is_right"]]
    if not failed:
        return right(f"all {len(found)} tests pass", tests=found)
    number, test = failed[0]
    why = f"{len(failed)} of {len(found)} tests fail; test {number}: {test['why']}"
    return wrong(why, tests=found)


class OverPrograms(SingleAnswerDomain):
    """A domain that runs programs in the sandbox and judges what they give.

    Args:
        backend: of the sandbox.
        limits: of one run.
        num_slots: runs at one time.
    """

    def __init__(
        self, backend: Backend, limits: Limits | None = None, *, num_slots: int | None = None
    ) -> None:
        self._programs = Coding(backend, limits, num_slots=num_slots)
