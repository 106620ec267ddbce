"""Task sets from a file, and which prompts they give: by ordinal, and by what was found so far."""

import asyncio
import json
from collections import Counter
from dataclasses import replace

import pytest

from megatron_k2.errors import UserError
from megatron_k2.gym.registry import generator_named
from megatron_k2.gym.task_sets import write_set
from megatron_k2.rewards.budget import Budget
from megatron_k2.rl.curriculum import Curriculum, Prompt, Stream
from megatron_k2.rl.schedule import Temperature, Toggle
from megatron_k2.rl.task_sets import open_domains, read_task_sets, task_set_of
from tests.rl.collecting import made, tasks

SUMS = {
    "name": "sums", "generator": "mathematics/sum_of_fractions", "number": 30, "seed": 7,
    "weight": 2, "max_tokens": 128, "temperature": "linear:1.0:0.7:100", "held_out": 5,
}  # fmt: skip


def read(folder, *rows):
    (folder / "tasks.json").write_text(json.dumps({"task_sets": rows}))
    return read_task_sets(folder / "tasks.json")


def test_a_file_names_sets_that_are_drawn_and_sets_on_disk(tmp_path):
    given = generator_named("mathematics/quadratic").sample(12, 1)
    write_set(tmp_path / "roots", given, "Apache-2.0", {"generator": "mathematics/quadratic"})
    toggle = {"iterations": 4, "accuracy": 0.5, "percentile": 75}
    on_disk = {"name": "roots", "tasks": "roots", "max_tokens": 64, "penalty": 0.25}
    sums, roots = read(tmp_path, SUMS, on_disk | {"toggle": toggle})
    assert (len(sums.tasks), len(sums.held_out), sums.weight) == (25, 5, 2.0)
    assert sums.temperature == Temperature(1.0, 0.7, 100, "linear")
    assert {task.budget_tokens for task in sums.tasks} == {128}
    assert roots.budget == Budget(64, 0.25)
    assert roots.toggle == Toggle(4, 0.5, 75)
    assert {task.id for task in roots.tasks} == {task.id for task in given}


def test_held_out_tasks_are_never_trained_on_and_the_same_in_any_order():
    given = tasks(20)
    one = task_set_of("a", given, Budget(8), 6)
    other = task_set_of("a", [*reversed(given), *given[:3]], Budget(8), 6)
    assert {task.id for task in one.held_out} == {task.id for task in other.held_out}
    assert {task.id for task in one.tasks}.isdisjoint(task.id for task in one.held_out)
    assert len(one.tasks) == len(other.tasks) == 14
    stream = Stream([one], 1)
    drawn = {stream.draw(n).task_id for n in range(200)}
    assert drawn.isdisjoint(task.id for task in one.held_out)


def test_a_task_keeps_a_budget_of_its_own():
    own = replace(tasks(1)[0], budget_tokens=3)
    assert task_set_of("a", [own], Budget(8)).tasks[0].budget_tokens == 3


def test_the_domains_of_all_tasks_are_opened():
    given = [
        *generator_named("tool_use/book").sample(2, 1),
        *generator_named("mathematics/quadratic").sample(2, 1),
    ]

    async def opened():
        found = await open_domains([task_set_of("a", given, Budget(8), 1)])
        for each in found.values():
            await each.close()
        return found

    assert {name: each.name for name, each in asyncio.run(opened()).items()} == {
        "mathematics": "mathematics", "tool_use": "tool_use",
    }  # fmt: skip


WRONG = {
    "generater": (
        {"generater": 1},
        "no field of a task set .*'generater'; did you mean 'generator'",
    ),
    "max_tokens": ({"max_tokens": None}, "max_tokens|int"),
    "both": ({"tasks": "x"}, "expected either tasks or generator"),
    "generator": ({"generator": "mathematics/sums"}, "no generator 'mathematics/sums'"),
    "held_out": ({"held_out": 30}, "held_out 30 of 30 distinct tasks leaves none"),
    "weight": ({"weight": 0}, "weight 0.0; expected more than 0"),
    "temperature": ({"temperature": "steps"}, "temperature 'steps': expected"),
    "reward": ({"reward": "taste"}, "reward 'taste'; one of verifiable, rubric"),
    "name": ({"name": ""}, "a task set without a name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_set_is_refused_by_name(tmp_path, name):
    changed, why = WRONG[name]
    with pytest.raises(UserError, match=why):
        read(tmp_path, SUMS | changed)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected a file of task sets"):
        read_task_sets(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"task_sets": {}}')
    with pytest.raises(UserError, match=r'expected \{"task_sets"'):
        read_task_sets(tmp_path / "bad.json")
    with pytest.raises(UserError, match="a name of its own for each"):
        read(tmp_path, SUMS, SUMS)


def stream_of(number=10, num_answers=4, **more):
    return Stream([task_set_of("a", tasks(number), Budget(8), **more)], 1, Curriculum(num_answers))


def played(stream, number, verdicts):
    """Draws prompts and answers them by ``verdicts(task_id)``."""
    found = []
    for ordinal in range(number):
        prompt = stream.draw(ordinal)
        stream.drawn(prompt)
        stream.answered(prompt, verdicts(prompt.task_id), (1,) * 4)
        found.append(prompt)
    return found


def test_the_first_round_has_every_task_once():
    found = played(stream_of(), 10, lambda _: (0, 1, 0, 1))
    assert len({prompt.task_id for prompt in found}) == 10


def test_sets_come_by_their_weights():
    sets = [
        task_set_of("a", tasks(5), Budget(8), weight=3.0),
        task_set_of("b", tasks(5, 1), Budget(8)),
    ]
    stream = Stream(sets, 1)
    counts = Counter(stream.draw(n).task_set for n in range(2000))
    assert 0.72 < counts["a"] / 2000 < 0.78


def test_always_right_and_never_right_are_left_out_and_hard_ones_come_more_often():
    stream = stream_of()
    ids = [task.id for task in stream.task_sets["a"].tasks]
    verdicts = {
        ids[0]: (1, 1, 1, 1), ids[1]: (0, 0, 0, 0), ids[2]: (0, 0, 0, 1), ids[3]: (1, 1, 1, 0),
    }  # fmt: skip
    found = played(stream, 810, lambda name: verdicts.get(name, (0, 1, 0, 1)))
    counts = Counter(prompt.task_id for prompt in found)
    assert counts[ids[0]] == counts[ids[1]] == 1
    assert stream.num_left_out == {"a": 2}
    assert 2 < counts[ids[2]] / counts[ids[3]] < 4.5  # 3/4 against 1/4
    assert 1.1 < counts[ids[2]] / counts[ids[4]] < 2  # 3/4 against 1/2


def test_too_few_answers_leave_nothing_out_and_unknown_ones_count_for_none():
    stream = stream_of(num_answers=8)
    played(stream, 10, lambda _: (1, 1, 1, None))
    assert stream.num_left_out == {"a": 0}
    prompt = stream.draw(99)
    for _ in range(2):
        stream.answered(prompt, (1, 1, None, 1), (1,) * 4)
    assert stream.is_left_out("a", prompt.task_id)


def test_a_set_of_which_all_is_left_out_comes_back():
    stream = stream_of(3)
    found = played(stream, 30, lambda _: (1, 1, 1, 1))
    assert stream.num_left_out == {"a": 3}
    assert len({prompt.task_id for prompt in found[3:]}) == 3


def test_prompts_in_play_are_passed_over():
    stream = stream_of(3)
    played(stream, 3, lambda _: (0, 1, 0, 1))
    ids = [task.id for task in stream.task_sets["a"].tasks]
    busy = {("a", ids[0]), ("a", ids[1])}
    assert {stream.draw(n, busy).task_id for n in range(20)} == {ids[2]}
    assert stream.draw(5, {("a", each) for each in ids}).task_id in ids


def test_what_is_drawn_after_a_restart_is_what_would_have_been(tmp_path):
    once = made(tmp_path / "once", curriculum=Curriculum(3))
    found = [once.collect(i) for i in range(10)]
    assert sum(found[-1].facts["num_left_out"].values()) > 0
    for number in range(10):
        m = made(tmp_path / "often", curriculum=Curriculum(3))
        again = m.collect(number)
        m.close()
        assert again.groups == found[number].groups
    forgetful = Stream(list(once.collector._stream.task_sets.values()), 5, Curriculum(3))
    remembered = once.collector._stream
    both = [(forgetful.draw(n), remembered.draw(n)) for n in range(40, 60)]
    assert any(one != other for one, other in both)  # a stream that knows nothing draws others


def test_toggles_budget_is_of_the_first_group_with_a_right_answer():
    toggle = Toggle(2, 0.5, 50)
    stream = stream_of(2, toggle=toggle)
    prompt = Prompt(0, "a", stream.task_sets["a"].tasks[0].id)
    stream.answered(prompt, (0, None), (5, 9))
    assert stream.toggle_budget(prompt) is None
    stream.answered(prompt, (1, 0, 1, None), (30, 2, 20, 1))
    assert stream.toggle_budget(prompt) == 20
    stream.answered(prompt, (1, 1), (1, 1))
    assert stream.toggle_budget(prompt) == 20
