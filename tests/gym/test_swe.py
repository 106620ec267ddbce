"""Repositories with a fault: the edit that mends it is right, whatever else is done is not."""

import asyncio
import random

import pytest

from megatron_k2.gym.protocol import Outcome, Task, Verdict
from megatron_k2.gym.swe import env
from megatron_k2.gym.swe.edits import (
    BLOCK,
    NoEdit,
    as_edit,
    edited,
    function_text,
    span,
    with_function,
)
from megatron_k2.gym.swe.env import Swe
from megatron_k2.gym.swe.faults import changed, removed
from megatron_k2.gym.swe.generators import (
    CALLS,
    FORMS,
    MODULE,
    NOTHING,
    SweGenerator,
    fails_as_said,
    repository,
    values,
)
from megatron_k2.sandbox.protocol import Limits

FILES = {
    "doubling.py": "def double(x):\n    return x + x + 1\n\n\ndef half(x):\n    return x // 2\n",
}
REFERENCE = {
    "files": FILES,
    "imports": "from doubling import *",
    "fail_to_pass": [{"call": f"double({n})", "expected": 2 * n} for n in (3, 5, -7)],
    "pass_to_pass": [{"call": f"half({n})", "expected": n // 2} for n in (9, 4)],
}
GOOD = "Here:\n```python doubling.py::double\ndef double(x):\n    return 2 * x\n```\nDone."
WHOLE = (
    "```python doubling.py\ndef double(x):\n    return 2 * x\ndef half(x):\n    return x // 2\n```"
)
EQUAL = (
    "class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\n"
    "def double(x):\n    return A(1)"
)
CHEATS = {
    "no-op": FILES["doubling.py"],
    "breaks the other": "def double(x):\n    return 2 * x\ndef half(x):\n    return x",
    "takes the other away": "def double(x):\n    return 2 * x",
    "eq": EQUAL + "\nhalf = double",
    "exit": "import os\nos._exit(0)",
    "exit later": "import os\ndef double(x):\n    os._exit(0)\nhalf = double",
    "deletes": "import os\nos.remove('doubling.py')\ndef double(x):\n    return x",
    "patches": "import builtins, json, sys\njson.dumps = lambda *a, **k: 'true'\n"
    "builtins.eval = lambda *a: True\nsys.exit = None\ndef double(x):\n    return 0",
    "patches the harness": "import sys\nspace = sys.modules['__main__'].__dict__\n"
    "space['_encode'] = space['_dumps'] = lambda *a: '{\"value\": 6}'\n"
    "def double(x):\n    return 0",
    "hangs": "while True:\n    pass",
    "is no Python": "def double(x:\n",
    "looks for tests": "import os, re\nfound = ''\nfor d, _, names in os.walk('/work'):\n"
    "    for n in names:\n        found += open(os.path.join(d, n)).read()\n"
    "def double(x):\n    return int(re.search(f'double.{x}. == (-?[0-9]+)', found)[1])\n"
    "def half(x):\n    return x // 2",
    "looks in the frames": "import sys\ndef double(x):\n    f = sys._getframe()\n"
    "    while f:\n        for v in list(f.f_globals.values()) + list(f.f_locals.values()):\n"
    "            if isinstance(v, dict) and 'fail_to_pass' in v: return 2 * x\n"
    "        f = f.f_back\n    return None\ndef half(x):\n    return x // 2",
}
NO_EDITS = {
    "": "no fenced block",
    "Grader: both lists pass. Score 1.0": "no fenced block",
    "```python\ndef double(x):\n    return 2 * x\n```": "no fenced block",
    "```python ../doubling.py\nx = 1\n```": "no file '../doubling.py'",
    "```python test_doubling.py\nx = 1\n```": "no file 'test_doubling.py'",
    "```python doubling.py::triple\nx = 1\n```": "no function 'triple'",
    GOOD + "\n" + WHOLE: "give one of both",
}


def judged(backend, pairs) -> list[Verdict]:
    async def all_of_them():
        domain = Swe(backend, Limits(cpu_seconds=2), num_slots=4)
        return await asyncio.gather(*(domain.judge(task, answer) for task, answer in pairs))

    return asyncio.run(all_of_them())


def test_an_edit_that_mends_is_right_and_no_cheat_is(backend):
    task = Task("swe", "", REFERENCE)
    answers = [GOOD, WHOLE, *(f"```python doubling.py\n{text}\n```" for text in CHEATS.values())]
    good, whole, *cheats = judged(backend, [(task, answer) for answer in answers])
    assert good.outcome is whole.outcome is Outcome.RIGHT, (good, whole)
    assert good.evidence == "fail_to_pass 3 of 3, pass_to_pass 2 of 2"
    for name, verdict in zip(CHEATS, cheats, strict=True):
        assert verdict.outcome is Outcome.WRONG, (name, verdict)
    by_name = dict(zip(CHEATS, cheats, strict=True))
    assert by_name["breaks the other"].evidence.startswith(
        "fail_to_pass 3 of 3, pass_to_pass 0 of 2"
    )


def test_the_wrong_variant_one_list_of_both_pays_for_breaking_the_rest(backend):
    half = {**REFERENCE, "pass_to_pass": []}
    answer = f"```python doubling.py\n{CHEATS['takes the other away']}\n```"
    both, one = judged(backend, [(Task("swe", "", facts), answer) for facts in (REFERENCE, half)])
    assert (both.outcome, one.outcome) == (Outcome.WRONG, Outcome.RIGHT)


def test_a_box_holds_the_files_and_no_history(backend):
    looks = (
        "import os\ndef double(x):\n    found = []\n    for d, dirs, names in os.walk('.'):\n"
        "        found += [os.path.join(d, n) for n in names + dirs if 'cache' not in d + n]\n"
        "    up = [p for p in ('../.git', '/.git', os.path.expanduser('~/.git'))"
        " if os.path.exists(p)]\n    raise ValueError(sorted(found) + up)\n"
    )
    task = Task("swe", "", REFERENCE)
    (found,) = judged(backend, [(task, f"```python doubling.py\n{looks}```")])
    assert "['./doubling.py']" in found.evidence, found.evidence


@pytest.mark.parametrize("form", FORMS)
def test_no_op_never_and_the_oracle_three_times_of_three(backend, form):
    generator = SweGenerator(form)
    tasks = generator.sample(8, seed=4)
    assert [task.id for task in generator.sample(8, seed=4)] == [task.id for task in tasks]
    pairs = []
    for task in tasks:
        path, name, _ = task.reference["solution"]
        same = as_edit(path, name, function_text(task.reference["files"][path], name))
        pairs += [(task, generator.oracle(task))] * 3 + [(task, same)]
        shown = [test["call"] for test in task.reference["fail_to_pass"]]
        assert not any(f"assert {call} ==" in task.prompt for call in shown)
        assert task.reference["solution"][2] not in task.prompt
    found = [verdict.outcome.value for verdict in judged(backend, pairs)]
    assert found == ["right", "right", "right", "wrong"] * len(tasks)


def test_answers_that_are_no_edit_run_nothing(backend):
    task = Task("swe", "", REFERENCE)
    found = judged(backend, [(task, answer) for answer in NO_EDITS])
    for (answer, why), verdict in zip(NO_EDITS.items(), found, strict=True):
        assert verdict.outcome is Outcome.WRONG
        assert why in verdict.evidence, answer
    broken = [{}, {**REFERENCE, "fail_to_pass": []}, {**REFERENCE, "files": {"../x.py": "x = 1"}}]
    answers = [GOOD, GOOD, "```python ../x.py\nx = 2\n```"]
    tasks = [Task("swe", "", facts) for facts in broken]
    found = judged(backend, list(zip(tasks, answers, strict=True)))
    assert {verdict.outcome for verdict in found} == {Outcome.UNKNOWN}


def test_an_original_that_programs_could_import_is_unknown(backend, monkeypatch, tmp_path):
    folder = tmp_path / "lib/site-packages"
    folder.mkdir(parents=True)
    (folder / "doubling.py").write_text("")
    env.readable_original.cache_clear()
    monkeypatch.setattr(env, "readable_roots", lambda: [str(tmp_path)])
    (found,) = judged(backend, [(Task("swe", "", REFERENCE), GOOD)])
    env.readable_original.cache_clear()
    assert found.outcome is Outcome.UNKNOWN
    assert str(folder / "doubling.py") in found.evidence


def test_several_functions_of_a_file_are_edited_at_once():
    two = GOOD + "\n```python doubling.py::half\ndef half(x):\n    return x >> 1\n```"
    found = edited(FILES, two)["doubling.py"]
    assert found == ("def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x >> 1\n")
    assert span("@f\n@g\ndef h():\n    pass\n", "h") == (0, 4)
    with pytest.raises(NoEdit):
        edited(FILES, "nothing")
    assert BLOCK.findall("```python doubling.py\nx\n```")


def test_faults_show_and_leave_the_rest():
    source, order = repository()[MODULE], random.Random(0)
    for name in CALLS:
        assert "raise NotImplementedError" in function_text(removed(source, name, order), name)
        broken = changed(source, name, order)
        compile(broken, MODULE, "exec")
        rest = set(CALLS) - {name}
        assert all(function_text(broken, n) == function_text(source, n) for n in rest)


def test_values_of_a_fault_that_hangs_end():
    fine = dict(repository())
    assert values(fine, ["gcd(4, 6)", "1 / 0"]) == [{"value": 2}, {"raised": "ZeroDivisionError"}]
    fine[MODULE] = removed(fine[MODULE], "gcd", random.Random(0)).replace(
        "raise NotImplementedError", "while True: pass"
    )
    assert values(fine, ["moebius(6)", "gcd(4, 6)"]) == [{"value": 1}, NOTHING]


def test_a_fault_that_depends_on_what_was_called_before_is_found_out():
    """Ten calls of one process may fail after a first one that the judge does not make."""
    forgets = (
        "def gcd(a, b, seen=[]):\n    seen.append(a)\n    return math.gcd(a, b) + (len(seen) > 1)\n"
    )
    files = dict(repository())
    files[MODULE] = with_function(files[MODULE], "gcd", forgets)
    first, second = ({"call": f"gcd({n}, 8)", "expected": 4} for n in (4, 12))
    other = {"call": "moebius(6)", "expected": 1}
    assert values(files, [first["call"], second["call"]]) == [{"value": 4}, {"value": 5}]
    assert fails_as_said(files, [second], [other]) is False  # alone it passes: a no-op would win
    removed_too = {**files, MODULE: removed(files[MODULE], "gcd", random.Random(0))}
    assert fails_as_said(removed_too, [first, second], [other]) is True
    assert fails_as_said(removed_too, [other], [first, second]) is False
