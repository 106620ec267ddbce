"""Which checkpoints of a run are whole, and which one its tracker file names."""

from megatron_k2.run.iterations import (
    BACKEND_RECORD,
    RELEASE,
    TRACKER,
    last_iteration,
    point_tracker,
    repair_tracker,
    whole_iterations,
)


def save_iterations(folder, steps):
    """Checkpoints of these steps -> whether their save came to its end."""
    for step, is_whole in steps.items():
        (folder / f"iter_{step:07d}").mkdir()
        if is_whole:
            (folder / f"iter_{step:07d}" / BACKEND_RECORD).write_text("{}")


def test_half_written_and_foreign_directories_are_not_whole(tmp_path):
    save_iterations(tmp_path, {12: True, 9: False, 3: True, 10_000_000: True})
    for name in ("iter_0000006.tmp", "rolled_back"):
        (tmp_path / name).mkdir()
        (tmp_path / name / BACKEND_RECORD).write_text("{}")
    assert whole_iterations(tmp_path) == [3, 12, 10_000_000]


def test_a_release_and_an_empty_directory_begin_at_step_0(tmp_path):
    assert last_iteration(tmp_path) == 0
    point_tracker(tmp_path, RELEASE)
    assert last_iteration(tmp_path) == 0
    point_tracker(tmp_path, 40)
    assert last_iteration(tmp_path) == 40


def test_a_tracker_that_a_kill_left_empty_points_to_the_last_whole_checkpoint(tmp_path):
    save_iterations(tmp_path, {3: True, 6: True, 9: False})
    (tmp_path / TRACKER).write_text("")
    repair_tracker(tmp_path)
    assert (tmp_path / TRACKER).read_text() == "6"


def test_a_whole_tracker_is_left_alone(tmp_path):
    (tmp_path / TRACKER).write_text("3\n")
    repair_tracker(tmp_path)
    assert (tmp_path / TRACKER).read_text() == "3\n"


def test_an_empty_tracker_without_any_whole_checkpoint_is_removed(tmp_path):
    (tmp_path / TRACKER).write_text("")
    repair_tracker(tmp_path)
    assert not (tmp_path / TRACKER).exists()
