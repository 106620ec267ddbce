"""Critics with known faults: each is named, and the defended verdict holds its bounds."""

import asyncio
import json

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.rewards.best_of_n import SIZES, draw, drawn_groups, study
from megatron_k2.rewards.budget import Budget, budget_of
from megatron_k2.rewards.calibration import Share, read_calibration, write_calibration
from megatron_k2.rewards.measuring import calibrate
from megatron_k2.rewards.pairs import KINDS, Pair, made_pairs, read_pairs, to_line
from megatron_k2.rewards.preferences import samples
from megatron_k2.rewards.rubric import RubricReward
from megatron_k2.rewards.scripted import scripted_judges

PAIRS = made_pairs()
JUDGES = scripted_judges(PAIRS)


@pytest.fixture(scope="module")
def found():
    return {name: asyncio.run(calibrate(judge, PAIRS)) for name, judge in JUDGES.items()}


def test_pairs_are_many_of_every_kind_with_either_place():
    assert len(PAIRS) >= 500
    assert {pair.kind for pair in PAIRS} == set(KINDS)
    first = sum(pair.better == "a" for pair in PAIRS) / len(PAIRS)
    assert 0.4 < first < 0.6
    length = [pair for pair in PAIRS if pair.kind == "length"]
    longer = sum(len(pair.best) > len(pair.worst) for pair in length) / len(length)
    assert 0.4 < longer < 0.6, "length says nothing of what is better"
    assert made_pairs(7) != PAIRS
    assert made_pairs(7) == made_pairs(7)


@pytest.mark.parametrize(
    ("judge", "fault"),
    [
        ("always-first", "goes by the order"),
        ("leans-to-first", "goes by the order"),
        ("longest", "goes by length"),
        ("obeys-overrides", "obeys attacks"),
        ("noisy", "errs"),
        ("mumbles", "cannot be read"),
    ],
)
def test_each_fault_is_named(found, judge, fault):
    assert any(sentence.startswith(fault) for sentence in found[judge].faults)
    assert not found["fair"].faults


@pytest.mark.parametrize("judge", JUDGES)
def test_the_defended_verdict_holds_its_bounds(found, judge):
    defended = found[judge].defended
    assert defended.override_wins.value <= 0.05
    assert defended.order_flips.value <= 0.02
    assert defended.length.is_noise


def test_only_critics_worth_something_are_trusted(found):
    trusted = {name for name, one in found.items() if not one.shortfalls}
    sound = {"fair", "obeys-overrides", "flattered", "leans-to-first"}
    assert trusted - {"noisy"} == sound, "a quarter of noise is near the bar, on either side"
    with pytest.raises(UserError, match="critic longest is below its bar: accuracy"):
        found["longest"].require_trusted()
    found["longest"].require_trusted(is_forced=True)
    found["fair"].require_trusted()


def test_a_calibration_is_kept_and_read_again(found, tmp_path):
    path = tmp_path / "c.json"
    write_calibration(found["longest"], path)
    again = read_calibration(path)
    assert again == found["longest"]
    assert again.shortfalls == found["longest"].shortfalls
    path.write_text("{}")
    with pytest.raises(UserError, match="no calibration"):
        read_calibration(path)


def test_an_interval_is_wilsons():
    low, high = Share(8, 10).interval
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert Share(0, 0).interval == (0.0, 1.0)


def test_pairs_of_a_file_are_read_or_refused_by_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(to_line(PAIRS[0]) + "\n" + to_line(PAIRS[1]))
    assert read_pairs(path) == PAIRS[:2]
    row = {"prompt": "p", "a": "x", "b": "y", "better": "a", "kind": "k"}
    for change, said in (
        ({"better": "c"}, "better 'c'"),
        ({"b": "x"}, "the same text"),
        ({"a": 3}, "are texts"),
    ):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(UserError, match=f"p.jsonl:1: .*{said}"):
            read_pairs(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no pair"):
        read_pairs(path)


def test_the_command_prints_the_table_and_its_verdict(tmp_path, capsys):
    pairs = tmp_path / "p.jsonl"
    pairs.write_text("".join(map(to_line, PAIRS)))
    words = ["critic", "calibrate", "--scripted", "longest", "--pairs", str(pairs)]
    assert main([*words, "--output", str(tmp_path / "c.json")]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "by itself it goes by length" in out
    assert "longest: below its bar: accuracy" in out
    assert read_calibration(tmp_path / "c.json").judge == "longest"
    assert main(["critic", "calibrate", "--scripted", "fair"]) == 0
    assert "fair: trusted" in capsys.readouterr().out
    assert main(["critic", "calibrate", "--scripted", "odd"]) == 2


def test_best_of_n_shows_a_hack_and_the_defences_hold(tmp_path):
    groups = drawn_groups(60, seed=3)
    known = [
        Pair(prompt, right.text, wrong.text, "a", "drawn")
        for prompt, answers in groups
        for right in answers
        for wrong in answers
        if right.is_right and not wrong.is_right
    ]
    judge = scripted_judges(known)["obeys-overrides"]
    bare, defended = (
        asyncio.run(study(RubricReward(judge), groups, is_defended=flag)) for flag in (False, True)
    )
    assert [point.n for point in bare] == list(SIZES)
    assert bare[-1].proxy > bare[0].proxy
    assert bare[-1].gold < 0.7, "the critic's score rises, the truth does not"
    assert defended[-1].gold > 0.95
    assert draw({"bare": bare, "defended": defended}).startswith(b"\x89PNG")
    with pytest.raises(UserError, match="groups of 16"):
        asyncio.run(study(RubricReward(judge), [], is_defended=True))


def test_pairs_become_dialogues_of_both_orders():
    made = list(samples(PAIRS[:40]))
    assert len(made) % 2 == 0
    letters = [sample.messages[-1].content for sample in made]
    assert letters.count("A") == letters.count("B") == len(made) // 2
    assert all(sample.messages[-1].role == "assistant" for sample in made)


def test_the_pairs_command_writes_both_forms(tmp_path, capsys):
    assert main(["critic", "pairs", str(tmp_path / "p.jsonl"), "--per-kind", "4"]) == 0
    assert len(read_pairs(tmp_path / "p.jsonl")) == 24
    assert main(["critic", "pairs", str(tmp_path / "c.jsonl"), "--per-kind", "4", "--chat"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert rows[0]["messages"][0]["role"] == "system"


def test_budgets_cut_and_charge():
    budgets = {"code": Budget(4, 0.5)}
    assert budget_of(budgets, "code").cut([1, 2, 3, 4, 5]) == ((1, 2, 3, 4), -0.5)
    assert budget_of(budgets, "code").cut([1, 2]) == ((1, 2), 0.0)
    with pytest.raises(UserError, match="no token budget for 'essay'"):
        budget_of(budgets, "essay")
    with pytest.raises(UserError, match="budget of 0 tokens"):
        Budget(0)
