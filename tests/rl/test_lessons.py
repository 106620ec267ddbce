"""A critic's lessons: what is in a pack, which pairs become one, what a run of them notes."""

import asyncio
import re

import numpy as np
import pytest

from megatron_k2.chat.template import Renderer
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.gym.protocol import Task
from megatron_k2.records.rollouts import End
from megatron_k2.rewards.budget import Budget
from megatron_k2.rewards.judge import Opinion
from megatron_k2.rewards.pairs import Pair
from megatron_k2.rewards.rubrics import DEFAULT
from megatron_k2.rl.critic import Refresher, Schedule
from megatron_k2.rl.lessons import LessonMaker, Teacher, lessons
from megatron_k2.rl.record import Group, Segment, Trajectory
from megatron_k2.rl.synthetic import write_tokenizer
from megatron_k2.rl.task_sets import TaskSet

ROOM = 4096


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "letters"
    write_tokenizer(directory, 2048)
    return Renderer(load_tokenizer(str(directory)))


def _pairs(number):
    return [
        Pair(f"What is {n} plus 1 ?", f"It is {n + 1}.", f"It is {n + 2}.", "a", "on-policy")
        for n in range(number)
    ]


def test_each_pair_is_asked_in_both_orders_and_only_the_letter_is_learnt(renderer):
    found = lessons(_pairs(3), DEFAULT, renderer, ROOM)
    assert found.num_too_long == 0
    dialogues = [
        (pack.tokens[start : start + length], pack.loss_mask[start : start + length])
        for pack in found.packs
        for start, length in zip(np.cumsum([0, *pack.lengths[:-1]]), pack.lengths, strict=True)
    ]
    assert len(dialogues) == 6
    letters = []
    for tokens, mask in dialogues:
        asked = [int(token) for token in tokens[mask > 0]]
        letters.append(renderer.tokenizer.decode(asked[:1]))
        assert len(asked) <= 2  # the letter, and the end of the turn
    assert sorted(letters) == ["A"] * 3 + ["B"] * 3
    for pack in found.packs:
        assert sum(pack.lengths) <= ROOM + len(pack.lengths)


def test_what_no_pack_holds_is_counted_and_not_cut(renderer):
    long = Pair("Why?", "x " * ROOM, "y.", "b", "on-policy")
    found = lessons([*_pairs(1), long], DEFAULT, renderer, ROOM)
    assert found.num_too_long == 2
    assert sum(len(pack.lengths) for pack in found.packs) == 2
    assert lessons([long], DEFAULT, renderer, ROOM) == ((), 2)


class Knows:
    """Decides by the numbers, rightly from the moment on that it was taught."""

    name = "knows"

    def __init__(self):
        self.is_taught = False

    async def compare(self, question):
        asked = int(re.search(r"What is (\d+)", question.prompt)[1]) + 1
        is_first = f"It is {asked}." in question.first
        return Opinion(0.9 if is_first is self.is_taught else 0.1, 1)


def _group(renderer, name, number):
    def answer(value, verdict):
        ids = tuple(renderer.tokenizer.encode(f"It is {value}."))
        drawn = Segment(ids, (-1.0,) * len(ids), 0)
        return Trajectory((Segment((1,)), drawn), verdict, {"verdict": verdict}, End.OVER)

    return Group(number, name, str(number), (answer(number + 1, 1.0), answer(number + 3, 0.0)))


def _teacher(renderer, critic):
    tasks = tuple(Task("m", f"What is {n} plus 1 ?", {}, id=str(n)) for n in range(80))
    sets = [
        TaskSet(name, tasks, Budget(8), reward=reward)
        for name, reward in (("sums", "verifiable"), ("taste", "rubric"))
    ]
    maker = LessonMaker(Schedule(every=2), renderer, sets, ROOM)
    return Teacher(maker, Refresher(critic))


def test_a_run_is_taught_by_verified_answers_alone_and_says_what_it_did(renderer):
    critic = Knows()
    teacher = _teacher(renderer, critic)
    groups = [_group(renderer, "sums", n) for n in range(60)]
    unverified = [_group(renderer, "taste", n) for n in range(60)]

    async def run():
        assert await teacher.told() == {}
        assert await teacher.lessons(0, groups) == ((), {})
        assert await teacher.lessons(1, unverified) == ((), {})
        packs, told = await teacher.lessons(1, groups + unverified)
        critic.is_taught = True
        return packs, told, await teacher.told(), await teacher.told()

    packs, told, after, again = asyncio.run(run())
    assert told == {"critic/too_long": 0}
    held_out = sum(pair.is_held_out for pair in _pairs(60))
    assert sum(len(pack.lengths) for pack in packs) == 2 * (60 - held_out)
    assert after["critic/pairs"] == 60 - held_out
    assert (after["critic/accuracy_before"], after["critic/accuracy_after"]) == (0, 1)
    assert again == {}


def test_the_same_groups_make_the_same_lessons(renderer):
    """A run that was killed makes them again from what its ledger holds."""
    groups = [_group(renderer, "sums", n) for n in range(60)]
    found = [asyncio.run(_teacher(renderer, Knows()).lessons(3, each))[0] for each in (groups,) * 2]
    for a, b in zip(*found, strict=True):
        assert (a.tokens == b.tokens).all()
        assert (a.loss_mask == b.loss_mask).all()
