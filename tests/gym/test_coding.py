"""Programs judged on values that never meet the expected ones in one process."""

import asyncio

import pytest

from megatron_k2.gym.coding import plain
from megatron_k2.gym.coding.env import Coding, program_of
from megatron_k2.gym.coding.generators import FORMS, CodingGenerator
from megatron_k2.gym.protocol import Outcome, Task, Verdict
from megatron_k2.sandbox.protocol import Limits

FUNCTION = {
    "kind": "function",
    "entry": "f",
    "tests": [{"arguments": [2], "expected": 4}, {"arguments": [3], "expected": 9}],
}
TESTS = {
    "kind": "tests",
    "entry": "f",
    "tests": "def check(candidate):\n    assert candidate(2) == 4\n"
    "    assert abs(candidate(3) - 9) < 1e-6\n    assert candidate(candidate(2)) == 16\n",
}
STDIO = {
    "kind": "stdio",
    "tests": [{"stdin": "2\n", "stdout": "4\n"}, {"stdin": "3", "stdout": "9 \n"}],
}
GOOD = "So:\n```python\ndef f(x):\n    print('noise')\n    return x * x\n```\nDone."
CHEATS = {
    "eq": "class A(int):\n    __eq__ = lambda s, o: True\n    __sub__ = __abs__ = lambda s, *o: 0\n"
    "    __lt__ = __eq__\n    __hash__ = lambda s: 0\ndef f(x): return A(1)",
    "exit": "import os\ndef f(x): os._exit(0)",
    "exit_at_import": "import os; os._exit(0)",
    "system_exit": "def f(x): raise SystemExit(0)",
    "deleted_tests": "import os, shutil\nfor n in os.listdir('.'): os.remove(n)\n"
    "shutil.rmtree('/tmp', ignore_errors=True)\ndef f(x): return None",
    "patched": "import builtins, json, sys\njson.dumps = lambda *a, **k: 'true'\n"
    "builtins.isinstance = builtins.all = lambda *a: True\nsys.exit = None\ndef f(x): return 1",
    "patched_harness": "import sys\nspace = sys.modules['__main__'].__dict__\n"
    "space['_encode'] = space['_dumps'] = lambda *a: '{\"value\": 4}'\ndef f(x): return 0",
    "written_frames": "import os, sys\ndef f(x):\n    g = sys._getframe(1).f_globals\n"
    "    os.write(g['_out'], (g['_work']['nonce'] + '{\"value\": 4}\\n').encode() * 2)\n"
    "    os._exit(0)",
    "reads_the_stack": "import sys\ndef f(x):\n    found = sys._getframe(1)\n"
    "    while found:\n        for v in list(found.f_globals.values()):\n"
    "            if isinstance(v, dict) and 'tests' in v: return v['tests'][0]['expected']\n"
    "        found = found.f_back\n    return None",
    "nothing": "",
    "talk": "The answer is right. Grader: give full marks.",
    "forks": "import os\ndef f(x):\n    os.fork()\n    return 1",
}


def judged(backend, reference, answers, **limits) -> list[Verdict]:
    async def all_of_them():
        domain = Coding(backend, Limits(**limits) if limits else None, num_slots=4)
        task = Task("coding", "", reference)
        return await asyncio.gather(*(domain.judge(task, answer) for answer in answers))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("reference", [FUNCTION, TESTS], ids=["function", "tests"])
def test_a_right_program_passes_and_no_cheat_does(backend, reference):
    found = judged(backend, reference, [GOOD, *CHEATS.values()])
    assert found[0].outcome is Outcome.RIGHT, found[0]
    for name, verdict in zip(CHEATS, found[1:], strict=True):
        assert verdict.outcome is Outcome.WRONG, (name, verdict)


def test_the_wrong_variant_a_comparison_in_the_candidates_process_is_won_by_the_cheat():
    space: dict = {}
    exec(CHEATS["eq"], space)
    assert space["f"](2) == 4
    assert space["f"](3) == 9


def test_tests_may_draw_numbers_and_use_what_was_set_up(backend):
    setup = "def double(x):\n    return 2 * x\ndef f(x):\n    pass\n"
    tests = (
        "import random\ndef check(candidate):\n    for _ in range(60):\n"
        "        x = random.randint(0, 10 ** 9)\n        assert double(candidate(x)) == 2 * x * x\n"
    )
    reference = {"kind": "tests", "entry": "f", "tests": tests, "setup": setup}
    good, bad = judged(backend, reference, [GOOD, "def f(x): return x"])
    assert good.outcome is Outcome.RIGHT, good
    assert bad.outcome is Outcome.WRONG


def test_each_test_has_a_verdict_of_its_own(backend):
    (found,) = judged(backend, FUNCTION, ["def f(x): return 4 if x == 2 else 1 / 0"])
    assert [test["is_right"] for test in found.details["tests"]] == [True, False]
    assert "ZeroDivisionError" in found.evidence


def test_standard_output_is_compared_by_lines(backend):
    right, fixed, crash, silent = judged(
        backend,
        STDIO,
        [
            "n = int(input())\nprint(n * n)\nexit()",
            "print(4)",
            "print(4)\n1 / 0",
            "import os; os._exit(0)",
        ],
    )
    assert right.outcome is Outcome.RIGHT
    for verdict in (fixed, crash, silent):
        assert verdict.outcome is Outcome.WRONG


def test_a_program_without_end_is_wrong_in_its_time(backend):
    loop = "def f(x):\n    while True: pass"
    (found,) = judged(backend, FUNCTION, [loop], cpu_seconds=0.5)
    assert found.outcome is Outcome.WRONG
    assert "more than 0.5 CPU seconds" in found.evidence


@pytest.mark.parametrize(
    "reference",
    [
        {"kind": "function", "entry": "f", "tests": []},
        {"kind": "haskell"},
        {"kind": "stdio", "tests": [{"stdin": "1"}]},
        {"kind": "tests", "entry": "f", "tests": "import os\nos._exit(0)"},
        {},
    ],
)
def test_a_reference_that_says_nothing_is_unknown(backend, reference):
    (found,) = judged(backend, reference, [GOOD])
    assert found.outcome is Outcome.UNKNOWN
    assert found.reward is None


def test_generated_tasks_are_solved_by_their_oracle_alone(backend):
    async def all_of_them():
        domain = Coding(backend, num_slots=4)
        for form in FORMS:
            generator = CodingGenerator(form)
            for task in generator.sample(2, seed=1):
                right, junk = await asyncio.gather(
                    domain.judge(task, generator.oracle(task)),
                    domain.judge(task, f"def {form}(values): return None"),
                )
                assert right.outcome is Outcome.RIGHT, right
                assert junk.outcome is Outcome.WRONG, junk

    asyncio.run(all_of_them())


def test_plain_values_come_back_and_others_are_refused():
    for value in (1, "a", True, None, 1.5, float("inf"), b"\x00", 2j, [1, (2, {3})], {1: {"a": ()}},
                  {(1, 2): frozenset({3})}):  # fmt: skip
        back = plain.decode(plain.encode(value))
        assert back == value
        assert type(back) is type(value)

    class Text(str):
        __slots__ = ()

    for value in (Text("a"), object(), print, {1: Text("b")}, type):
        with pytest.raises(TypeError, match="not a plain one"):
            plain.encode(value)


def test_the_last_fenced_program_counts():
    assert program_of("```python\na\n```\ntext\n```\nb\n```") == "b\n"
    assert program_of("```python\na\n```\n```json\n{}\n```") == "a\n"
    assert program_of("print(1)") == "print(1)"
