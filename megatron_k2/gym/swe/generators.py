"""Repositories cut out of installed packages, one function of them broken.

mpmath (BSD) comes with torch, by way of sympy. The right values are those of the package as it is,
found in a process of its own; a test is *fail to pass* where the broken one gives another.
"""

import functools
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_k2.gym.drawn import DrawnGenerator
from megatron_k2.gym.protocol import Task
from megatron_k2.gym.swe.edits import as_edit, function_text
from megatron_k2.gym.swe.env import ENTRY, NAME, harness
from megatron_k2.gym.swe.faults import Fault, changed, removed

MODULE = "mpmath/libmp/libintmath.py"
FILES = ("mpmath/__init__.py", "mpmath/libmp/__init__.py", "mpmath/libmp/backend.py", MODULE)
IMPORTS = "from mpmath.libmp.libintmath import *"
NUM_OWN, NUM_SHOWN, NUM_OTHERS = 10, 2, 8
WALL_SECONDS = 60.0
"""Behind the CPU time of ``_RUN``: on a busy machine the same seed gives the same tasks."""
MOST_DRAWS = 50

type Draw = Callable[[random.Random], str]

CALLS: dict[str, Draw] = {
    "ifac2": lambda r: f"ifac2({r.randint(0, 40)})",
    "ifib": lambda r: f"ifib({r.randint(-30, 90)})",
    "list_primes": lambda r: f"list_primes({r.randint(2, 150)})",
    "isprime": lambda r: f"isprime({r.choice((r.randint(0, 60), 2 * r.randint(30, 900) + 1))})",
    "moebius": lambda r: f"moebius({r.randint(-120, 120)})",
    "gcd": lambda r: f"gcd({', '.join(str(6 * r.randint(1, 99)) for _ in range(3))})",
    "eulernum": lambda r: f"eulernum({2 * r.randint(0, 12) + (r.random() < 0.2)})",
    "stirling1": lambda r: f"stirling1({r.randint(0, 9)}, {r.randint(0, 9)})",
    "stirling2": lambda r: f"stirling2({r.randint(0, 9)}, {r.randint(0, 9)})",
    "sqrtrem_python": lambda r: f"list(sqrtrem_python({r.getrandbits(r.randint(1, 900))}))",
    "small_numeral": lambda r: f"small_numeral({r.randint(1, 10**6)}, {r.randint(2, 16)})",
    "bin_to_radix": lambda r: (
        f"bin_to_radix({r.getrandbits(60)}, {r.randint(1, 40)}, 10, {r.randint(1, 12)})"
    ),
}


@functools.cache
def repository() -> dict[str, str]:
    """Files of the package as it is installed; its ``__init__`` files are emptied."""
    found = importlib.util.find_spec("mpmath")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("mpmath is not installed; it comes with sympy")
    folder = Path(found.origin).parent.parent
    return {
        path: "" if path.endswith("__init__.py") else (folder / path).read_text("utf-8")
        for path in FILES
    }


_RUN = """
import json, resource, signal, sys, types
signal.setitimer(signal.ITIMER_PROF, 0.4)  # CPU seconds
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
work = json.load(sys.stdin)
for path, text in work["files"].items():
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = sys.modules[name] = types.ModuleType(name)
    module.__package__ = name if path.endswith("__init__.py") else name.rpartition(".")[0]
    module.__path__ = []
    exec(compile(text, path, "exec"), vars(module))
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
space = {}
exec(work["harness"], space)
for call in work["calls"]:
    try:
        print(json.dumps({"value": space[work["entry"]](call)}), flush=True)
    except Exception as error:
        print(json.dumps({"raised": type(error).__name__}), flush=True)
"""
"""Our own calls on a package that is installed, or on it with a fault of ours, which may hang."""


NOTHING = {"raised": "nothing"}
"""Of a call that did not return, and of those after it. A fault with such a call is not taken: how
long programs may run is the sandbox's to say."""


def values(files: dict[str, str], calls: list[str]) -> list[dict[str, Any]]:
    """What each call gives; ``NOTHING`` for those that the time does not suffice for."""
    work = {"files": files, "calls": calls, "harness": harness(IMPORTS), "entry": ENTRY}
    command = [sys.executable, "-I", "-S", "-c", _RUN]
    try:
        run = subprocess.run(
            command, input=json.dumps(work).encode(), capture_output=True, timeout=WALL_SECONDS
        )
        said = run.stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
    lines = [json.loads(line) for line in said.splitlines() if line.endswith(b"}")]
    return [*lines, *[NOTHING] * len(calls)][: len(calls)]


def fails_as_said(
    files: dict[str, str], failing: list[dict[str, Any]], passing: list[dict[str, Any]]
) -> bool:
    """Whether each test is what its list says, when they run in the judge's order.

    What a fault does may depend on the calls before: the package keeps some of its values.
    """
    found = values(files, [test["call"] for test in [*failing, *passing]])
    is_same = [
        each == {"value": test["expected"]}
        for each, test in zip(found, [*failing, *passing], strict=True)
    ]
    return is_same == [False] * len(failing) + [True] * len(passing)


FORMS: dict[str, Fault] = {"removed": removed, "changed": changed}


class SweGenerator(DrawnGenerator):
    """One kind of fault; each task draws another function, place and tests."""

    domain = NAME

    def _made(self, order: random.Random) -> Task:
        """The first draw whose fault shows, and leaves something that must still pass."""
        for _ in range(MOST_DRAWS):
            if task := self._drawn(order):
                return task
        raise RuntimeError(f"{MOST_DRAWS} faults drawn, and none of them shows")

    def _drawn(self, order: random.Random) -> Task | None:
        files, function = repository(), order.choice(list(CALLS))
        broken = {**files, MODULE: FORMS[self._form](files[MODULE], function, order)}
        drawn = [CALLS[function](order) for _ in range(NUM_OWN + NUM_SHOWN)]
        drawn += [CALLS[name](order) for name in order.sample(sorted(CALLS), NUM_OTHERS)]
        calls = list(dict.fromkeys(drawn))
        gold, now = values(files, calls), values(broken, calls)
        tests = [
            ({"call": call, "expected": right["value"]}, right == found)
            for call, right, found in zip(calls, gold, now, strict=True)
            if "value" in right
        ]
        failing = [test for test, is_same in tests if not is_same]
        shown, hidden = failing[:NUM_SHOWN], failing[NUM_SHOWN:]
        passing = [test for test, is_same in tests if is_same]
        # One value for all of them would be solved by a function that returns it.
        if len({str(test["expected"]) for test in hidden}) < 2 or not passing:
            return None
        if NOTHING in now or not fails_as_said(broken, hidden, passing):
            return None
        reference = {
            "files": broken,
            "imports": IMPORTS,
            "fail_to_pass": hidden,
            "pass_to_pass": passing,
            "solution": [MODULE, function, function_text(files[MODULE], function)],
        }
        return Task(NAME, _asked(broken, shown), reference, source=self.name)

    def oracle(self, task: Task) -> str:
        """The function as the package has it."""
        return as_edit(*task.reference["solution"])


def _asked(files: dict[str, str], shown: list[dict[str, Any]]) -> str:
    tests = "\n".join(f"assert {test['call']} == {test['expected']!r}" for test in shown)
    texts = "\n\n".join(f"{path}:\n```\n{text}```" for path, text in files.items() if text)
    return (
        f"A repository has these files:\n\n{texts}\n\nThese tests fail:\n```\n{IMPORTS}\n{tests}\n"
        "```\nFind the fault and mend it, for all arguments and without breaking anything else. "
        f"Answer with a fenced block that begins with ```python {MODULE} and holds the whole file, "
        f"or with ```python {MODULE}::name and one function of it."
    )
