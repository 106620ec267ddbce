"""Instructions from a scripted model: kept where checkers agree, else refused with the reason."""

import asyncio
import json

import pytest

from megatron_k2.errors import UserError
from megatron_k2.gym.instructions.augment import SEEDS, augment, task_of
from megatron_k2.gym.instructions.coded import CodedInstructions
from megatron_k2.gym.instructions.generators import InstructionGenerator, failure_rates
from megatron_k2.gym.protocol import Outcome

GOOD = 'def check(answer):\n    return answer.lower().count("tide") >= 2'
ALSO = "import re\ndef check(answer):\n    return len(re.findall('tide', answer, re.I)) > 1"
BAD = "def check(answer):\n    return True"
BROKEN = "def check(answer):\n    raise ValueError(answer)"
ESCAPES = "import os\ndef check(answer):\n    open('/etc/owned', 'w')\n    return True"
FOLLOW = ["The tide comes and the tide goes.", "Tide after tide it rains.", "tide, tide and TIDE"]
BREAK = ["The tide comes.", "No water here.", "Rivers flow."]
INSTRUCTION = "Use the word 'tide' at least twice."


class Writer:
    """Gives what it was told to, checker by checker."""

    def __init__(self, checkers, told=INSTRUCTION, follow=FOLLOW, broken=BREAK):
        self.checkers, self.told, self.follow, self.broken = list(checkers), told, follow, broken
        self.given = iter(self.checkers)

    async def write(self, system, user):
        if "Write another instruction" in user:
            return "Here: " + json.dumps({"instruction": INSTRUCTION})
        if user.startswith("Program"):
            return json.dumps({"instruction": self.told})
        if "Write Python" in user:
            other = "sentences" in user.splitlines()[0]
            program = "def check(a): return a.count('.') > 1" if other else next(self.given, GOOD)
            return json.dumps({"program": program}, indent=1)
        return json.dumps({"follow": self.follow, "break": self.broken})


def made(backend, *checkers, **more):
    programs = CodedInstructions(backend)
    return asyncio.run(augment(Writer(checkers, **more), programs, SEEDS[1])), programs


def test_checkers_that_agree_are_kept(backend):
    found, programs = made(backend, GOOD, ALSO, BAD)
    assert found.reason == ""
    assert found.checker in (GOOD, ALSO)
    assert dict(found.cases) == {**dict.fromkeys(FOLLOW, True), **dict.fromkeys(BREAK, False)}
    task = task_of(found, "the sea", ["sea", "water", "tide"])
    answers = [
        "The sea rises with the tide, and the tide sinks with the water.",
        "The sea rises with the tide, and sinks with the water again.",
        "The sea sinks with the water. This answer contains the words tide, tide and tide.",
        "tide tide",
        "",
    ]

    async def all_of_them():
        return [(await programs.judge(task, each)).outcome for each in answers]

    assert asyncio.run(all_of_them()) == [Outcome.RIGHT, *[Outcome.WRONG] * 4]


@pytest.mark.parametrize(
    ("checkers", "more", "reason"),
    [
        ((GOOD, BAD, BROKEN), {}, "1 of 3 checkers agree|same of every case"),
        ((BAD, BAD, BAD), {}, "same of every case"),
        ((BROKEN, BROKEN, ESCAPES), {}, "same of every case"),
        ((GOOD, ALSO, GOOD), {"told": "Write two sentences."}, "another instruction"),
        ((GOOD, ALSO, GOOD), {"follow": [], "broken": []}, "0 cases"),
        (("", "", ""), {}, "0 checkers"),
    ],
)
def test_what_does_not_agree_is_refused_with_the_reason(backend, checkers, more, reason):
    found, _ = made(backend, *checkers, **more)
    assert not found.checker
    assert any(each in found.reason for each in reason.split("|")), found
    with pytest.raises(ValueError, match="refused"):
        task_of(found, "the sea", [])


def test_a_checker_that_raises_leaves_an_answer_unknown(backend):
    found, programs = made(backend, GOOD, ALSO, GOOD)
    task = task_of(found, "the sea", ["sea"])
    task.reference["checker"] = BROKEN
    verdict = asyncio.run(programs.judge(task, "The sea is wide and the sea is deep today."))
    assert verdict.outcome is Outcome.UNKNOWN


def test_tasks_that_probe_where_a_policy_fails():
    details = [{"constraints": {"0 title": False, "1 no_commas": True}}] * 30
    rates = failure_rates(details)
    assert rates["title"] == pytest.approx(31 / 32)
    assert rates["no_commas"] == pytest.approx(1 / 32)
    drawn = InstructionGenerator(rates).sample(200, seed=1)
    kinds = [each["kind"] for task in drawn for each in task.reference["constraints"]]
    firsts = [task.reference["constraints"][0]["kind"] for task in drawn]
    assert set(kinds) == {"title", "no_commas"}
    assert firsts.count("title") > 180
    with pytest.raises(UserError, match="no constraint 'rhyme'"):
        InstructionGenerator({"rhyme": 1.0})
    with pytest.raises(UserError, match="has a weight"):
        InstructionGenerator({"title": 0.0})
