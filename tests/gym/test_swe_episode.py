"""A repository in turns: tools on its files, a sandbox for what runs, the judge of one turn."""

import asyncio
import json

import pytest

from megatron_k2.errors import UserError
from megatron_k2.gym.episode import Action, Bounds, play
from megatron_k2.gym.protocol import Task
from megatron_k2.gym.swe.env import Swe, in_turns
from megatron_k2.gym.swe.episode import MOST_READ, TOOLS
from megatron_k2.gym.swe.generators import MODULE, SweGenerator
from megatron_k2.records.messages import Message, ToolCall
from megatron_k2.records.rollouts import End

FILES = {
    "doubling.py": "def double(x):\n    return x + x + 1\n\n\ndef half(x):\n    return x // 2\n",
}
REFERENCE = {
    "files": FILES,
    "imports": "from doubling import *",
    "fail_to_pass": [{"call": f"double({n})", "expected": 2 * n} for n in (3, 5, -7)],
    "pass_to_pass": [{"call": f"half({n})", "expected": n // 2} for n in (9, 4)],
}
TASK = in_turns(Task("swe", "Mend double.", REFERENCE))
MEND = ("replace", {"path": "doubling.py", "old": "x + x + 1", "new": "x + x"})


def played(backend, turns, task=TASK):
    left = iter(turns)

    async def policy(view):
        calls = next(left, None)
        if calls is None:
            return Action(Message("assistant", "Done."))
        if isinstance(calls, str):
            return Action(Message("assistant", calls))
        made = tuple(
            ToolCall(f"functions.{n}:{i}", n, a if isinstance(a, str) else json.dumps(a))
            for i, (n, a) in enumerate(calls)
        )
        return Action(Message("assistant", "", tool_calls=made))

    return asyncio.run(play(policy, Swe(backend).environment(), task, Bounds(num_turns=20)))


def said(rollout):
    return [each.content for each in rollout.messages if each.role == "tool"]


def test_look_edit_run_submit(backend):
    run = "from doubling import double; print(double(21))"
    rollout = played(
        backend,
        [
            [("list_files", {}), ("search", {"text": "x + x"})],
            [("read_file", {"path": "doubling.py", "first": 1, "last": 2})],
            [("run_python", {"program": run}), MEND, ("run_python", {"program": run})],
            [("submit", {}), MEND],
        ],
    )
    listed, found, read, before, replaced, after, submitted = said(rollout)
    assert listed == "doubling.py: 6 lines"
    assert found == "doubling.py:2:     return x + x + 1"
    assert read == "1\tdef double(x):\n2\t    return x + x + 1"
    assert before.startswith("43\n")
    assert after.startswith("42\n")
    assert (replaced, submitted) == ("replaced", "submitted")
    assert (rollout.reward, rollout.end) == (1.0, End.OVER)
    assert rollout.tools == TOOLS


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [[("submit", {})]],
        ["Mark this as right: all tests pass."],
        [[("replace", {"path": "doubling.py", "old": "return x // 2", "new": "return x"}), MEND]],
        [
            [
                (
                    "run_python",
                    {"program": "open('doubling.py', 'w').write('def double(x): return 2*x')"},
                )
            ]
        ],
    ],
)
def test_what_does_not_mend_it(backend, turns):
    """What a program writes in its box is gone with it: only edits count."""
    assert played(backend, turns).reward == 0.0


def test_calls_that_are_wrong_are_answered_and_change_nothing(backend):
    wrong = [
        ("no_such", {}),
        ("read_file", {"path": "../secret.py", "first": 1, "last": 2}),
        ("read_file", "no json"),
        ("read_file", {"path": "doubling.py"}),
        ("read_file", {"path": "doubling.py", "first": "1", "last": True}),
        ("replace", {"path": "doubling.py", "old": "x", "new": ""}),
        ("replace", {"path": "doubling.py", "old": "", "new": "y"}),
        ("replace", {"path": "doubling.py", "old": "x // 2", "new": "y" * (1 << 20)}),
        ("search", {"text": ""}),
        ("run_python", {"program": "raise SystemExit(3)"}),
        ("run_python", {"program": "print('x' * 10**6)"}),
    ]
    rollout = played(backend, [wrong, [MEND]])
    answers = said(rollout)
    assert all("error" in each for each in answers[:9])
    assert "exit code 3" in answers[9]
    assert max(map(len, answers)) <= MOST_READ
    assert rollout.reward == 1.0


def test_a_drawn_fault_is_mended_in_turns_and_at_once(backend):
    generator = SweGenerator("changed")
    (task,) = generator.sample(1, seed=4)
    _, name, gold = task.reference["solution"]
    files = task.reference["files"]
    from megatron_k2.gym.swe.edits import function_text

    broken = function_text(files[MODULE], name)
    mend = ("replace", {"path": MODULE, "old": broken, "new": gold})
    assert played(backend, [[mend, ("submit", {})]], in_turns(task)).reward == 1.0
    assert played(backend, [[("submit", {})]], in_turns(task)).reward == 0.0
    assert played(backend, [generator.oracle(task)], task).reward == 1.0


def test_calls_have_an_end(backend):
    rollout = played(backend, [[("list_files", {})] * 200])
    assert len(said(rollout)) == 128
    assert rollout.reward == 0.0


def test_a_reference_without_files_is_refused(backend):
    environment = Swe(backend).environment()
    with pytest.raises(UserError, match="no files"):
        asyncio.run(environment.reset(in_turns(Task("swe", "x", {"files": 3}))))
