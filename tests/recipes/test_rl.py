"""Reinforcement learning's twin: its flags, the tasks and the tokenizer made for it, a run."""

import re

import pytest

from megatron_k2.chat.template import Renderer
from megatron_k2.cli.main import main
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value
from megatron_k2.gym.instructions.check import check
from megatron_k2.launch.bridge_config import to_bridge_config
from megatron_k2.launch.overrides import apply
from megatron_k2.presets import K2_TINY
from megatron_k2.recipes import get_recipe
from megatron_k2.rl.checks import check_whole
from megatron_k2.rl.history import read_history
from megatron_k2.rl.side import FOLDER
from megatron_k2.rl.synthetic import letter_tasks, write_letter_tasks, write_tokenizer
from megatron_k2.rl.task_sets import read_task_sets
from megatron_k2.run.flags import read_flags
from megatron_k2.run.iterations import last_iteration

NAME = "kimi_k2_rl_cpu"


def test_the_phase_is_counted_in_iterations_and_groups(tmp_path):
    recipe = apply(get_recipe(NAME), ["stage.group_size=8", f"data.root={tmp_path}"])
    flags = recipe.to_megatron_args("runs/b", "runs/a")
    assert last_value(flags, "--iterations") == "6"
    assert last_value(flags, "--prompts-per-iteration") == "4"
    assert last_value(flags, "--group-size") == "8"
    assert last_value(flags, "--global-batch-size") == "32"
    assert last_value(flags, "--on-spike") == "off"
    assert "--train-samples" not in flags[flags.index("--iterations") :]
    assert last_value(flags, "--pretrained-checkpoint") == "runs/a"
    assert last_value(flags, "--tasks") == f"{tmp_path}/letters.json"
    check_whole(read_flags(flags), 1)  # nothing is there yet


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stage.group_size=5", "a number that divides them"),
        ("stage.group_size=0", "a number that divides them"),
        ("phase.shape=linear", "expected constant"),
    ],
)
def test_what_cannot_be_counted_so_is_refused(assignment, words):
    with pytest.raises(UserError, match=words):
        apply(get_recipe(NAME), [assignment]).program_flags("runs/x")


def test_bridge_has_no_loop_for_it():
    with pytest.raises(UserError, match="no loop that samples"):
        to_bridge_config(get_recipe(NAME), "runs/x")


def test_the_dry_run_names_program_tasks_and_what_is_learnt_from(capsys):
    assert main(["launch", NAME, "--dry-run"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "on_every_rank megatron_k2.rl.train" in found
    assert "rewards against the mean of 4 answers" in found
    assert "tasks letters.json, tokenizer letters_tokenizer; runs/synthetic (made there)" in found


def test_tasks_and_tokenizer_are_made_once_and_can_be_trained_on(tmp_path):
    for _ in range(2):
        write_letter_tasks(tmp_path / "letters.json")
        write_tokenizer(tmp_path / "tokenizer", K2_TINY.vocab_size)
    (found,) = read_task_sets(tmp_path / "letters.json")
    assert len(found.tasks) + len(found.held_out) == len(letter_tasks())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == K2_TINY.vocab_size
    Renderer(tokenizer)  # which asks for K2's control tokens
    assert {path.name for path in tmp_path.iterdir()} == {
        *("letters.json", "letters.jsonl", "tokenizer"),
    }


def test_a_letter_task_is_passed_by_any_text_with_the_letter():
    reference = letter_tasks()[0].reference
    few, many = "one two six ten nine", "that top tutor taught twelve tiny tots to tie ties"
    outcomes = [check(**reference, answer=text)["outcome"] for text in (few, many)]
    assert outcomes == ["wrong", "right"]


@pytest.mark.slow
@pytest.mark.dist
def test_the_twin_samples_and_learns_from_nothing_but_the_package(tmp_path, capfd):
    save = tmp_path / "run"
    words = ["--set", f"data.root={tmp_path}/data", "--set", "phase.tokens=8192"]
    argv = ["launch", NAME, "--executor", "local", "--save", str(save), *words]
    assert main(argv) == 0
    rows = read_history(save / FOLDER)
    assert [row.iteration for row in rows] == [0, 1]
    assert [row.version for row in rows] == [0, 1], "a step each: some groups are live"
    assert all(row.metrics["learn/mismatch"] < 1e-5 for row in rows)
    assert last_iteration(save) == 2
    assert re.search(r"iteration 2/2 .* reward letters", capfd.readouterr().out)
