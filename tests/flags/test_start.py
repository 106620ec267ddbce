"""Which checkpoint a start reads: the run's own where it has one, and why, in a sentence."""

import pytest

from megatron_k2.flags.megatron import expand, last_value
from megatron_k2.flags.start import start_sentence
from megatron_k2.run.flags import read_flags
from megatron_k2.run.iterations import (
    BACKEND_RECORD,
    RELEASE,
    TRACKER,
    iteration_directory,
    point_tracker,
    resumable_iteration,
)
from megatron_k2.run.leftovers import remove_torn_checkpoints, set_run_aside
from megatron_k2.run.metrics import METRICS_FILE


def _saved(directory, *steps, whole=True):
    for step in steps:
        iteration_directory(directory, step).mkdir(parents=True)
        if whole:
            (iteration_directory(directory, step) / BACKEND_RECORD).write_text("{}")
    if whole:
        point_tracker(directory, steps[-1])
    return directory


@pytest.fixture
def runs(tmp_path):
    """Run A at step 8, and where B will be."""
    return str(_saved(tmp_path / "a", 4, 8)), str(tmp_path / "b")


def _start(*typed):
    words = expand(["--preset", "k2-tiny", "--mock-data", *typed], cuda=False)
    return words, start_sentence(read_flags(words))


@pytest.mark.parametrize(
    "how", [[], ["--finetune"], ["--no-load-optim", "--no-load-rng"], ["--ckpt-step", "4"]]
)
def test_a_checkpoint_of_its_own_wins_over_the_run_it_started_from(runs, tmp_path, how):
    a, b = runs
    command = ["--load", a, "--save", b, *how]
    first, said = _start(*command)
    assert last_value(first, "--load") == a
    assert said == f"starting from {a}, step {'4' if '--ckpt-step' in how else '8'}"
    assert set(how) <= set(first)
    _saved(tmp_path / "b", 2)
    again, said = _start(*command)
    assert last_value(again, "--load") == b
    flags = [word for word in how if word.startswith("--")]
    assert not {*flags} & {*again}
    assert said.startswith(f"resuming from {b}, step 2: --save has a checkpoint of its own")
    assert f"without load {a}" in said
    assert all(flag.removeprefix("--") in said for flag in flags)


def test_weights_that_were_imported_into_save_are_no_progress_of_the_run(runs, tmp_path):
    a, b = runs
    (tmp_path / "b").mkdir()
    point_tracker(tmp_path / "b", RELEASE)
    assert last_value(_start("--load", a, "--save", b)[0], "--load") == a


def test_start_over_reads_the_other_run_again_and_puts_this_one_aside(runs, tmp_path):
    a, b = runs
    save = _saved(tmp_path / "b", 2, 6)
    (save / METRICS_FILE).write_text("{}\n")
    words, said = _start("--load", a, "--save", b, "--finetune", "--start-over")
    assert last_value(words, "--load") == a
    assert "--finetune" in words
    assert said == f"starting from {a}, step 8, not from step 6 of {b} (--start-over)"
    aside = set_run_aside(save)
    assert resumable_iteration(save) is None
    assert {p.name for p in aside.iterdir()} == {
        *(TRACKER, METRICS_FILE, "iter_0000002", "iter_0000006")
    }
    assert set_run_aside(save) is None


def test_start_over_without_another_run_begins_anew_also_where_a_recipe_names_its_own(tmp_path):
    b = str(_saved(tmp_path / "b", 2))
    for own in ([], ["--load", b]):
        words, said = _start("--save", b, *own, "--start-over")
        assert last_value(words, "--load") is None
        assert said == f"starting anew, not from step 2 of {b} (--start-over)"
    assert last_value(_start("--save", b)[0], "--load") == b


def test_a_tracker_file_that_a_kill_left_empty_counts_as_what_becomes_of_it(runs, tmp_path):
    a, b = runs
    save = _saved(tmp_path / "b", 2, 4)
    (save / TRACKER).write_text("")
    words, said = _start("--load", a, "--save", b)
    assert last_value(words, "--load") == b
    assert "step 4" in said


def test_a_torn_checkpoint_is_said_and_removed_and_whole_or_earlier_ones_stay(tmp_path):
    save = _saved(tmp_path, 4)
    _saved(save, 6, 2, whole=False)
    (iteration_directory(save, 6) / "__0_0.distcp").write_bytes(b"x" * 1000)
    (said,) = remove_torn_checkpoints(save)
    assert "iter_0000006: its save did not come to its end (1,000 bytes); removed" in said
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    assert remove_torn_checkpoints(save) == []
