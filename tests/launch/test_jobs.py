"""Jobs of a run as Slurm's commands describe them, with stand-ins for the commands."""

import os

import pytest

from megatron_k2.launch.jobs import follow, log_path, note

INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
UNREACHED = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with one job, and what sacct and squeue answer, one call after another."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    monkeypatch.setenv("PATH", f"{bin_directory}:{os.environ['PATH']}")
    note(str(tmp_path / "run"), "7")
    log_path(str(tmp_path / "run")).write_text("first start\n")

    def answers(command, *lines):
        # The last answer is given for ever.
        cases = "\n".join(f"{number}) {line};;" for number, line in enumerate(lines[:-1]))
        program = bin_directory / command
        program.write_text(
            f"#!/bin/bash\nn=$(cat $0.calls 2>/dev/null || echo 0); echo $((n + 1)) > $0.calls\n"
            f"case $n in\n{cases}\n*) {lines[-1]};;\nesac\n"
        )
        program.chmod(0o755)

    return str(tmp_path / "run"), answers, bin_directory


@pytest.mark.parametrize("gone", [INVALID, "true", "echo PREEMPTED"])
def test_a_log_is_followed_to_the_end_of_a_job_that_was_preempted_for_good(run, gone):
    save, answers, _ = run
    answers("sacct", "echo '7|RUNNING|00:01'", "echo '7|PREEMPTED|00:02'")
    answers("squeue", gone)
    assert "".join(follow(save, poll_seconds=0.01)) == "first start\n"


def test_a_preempted_job_that_goes_back_to_the_queue_is_followed_on(run):
    save, answers, bin_directory = run
    preempted = "echo '7|PREEMPTED|00:02'"
    answers("sacct", *3 * [preempted], "echo '7|PENDING|00:00'", "echo '7|COMPLETED|00:03'")
    answers("squeue", "echo COMPLETING", UNREACHED, "echo PENDING")
    text = follow(save, poll_seconds=0.01)
    assert next(text) == "first start\n"
    with log_path(save).open("a") as log:
        log.write("second start\n")
    assert "".join(text) == "second start\n"
    assert (bin_directory / "sacct.calls").read_text() == "5\n"
