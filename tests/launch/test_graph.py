"""A chain of phases: order, what is passed over, where a failure stops it; and jobs afterwards."""

import json
import re
from pathlib import Path

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.launch import jobs
from megatron_k2.launch.cluster import Cluster
from megatron_k2.launch.graph import chain_summary, places, run_chain, submit_chain
from megatron_k2.launch.slurm import render
from megatron_k2.planning.phases import kimi_k2_phases
from megatron_k2.recipes import CHAINS, get_chain, get_recipe
from megatron_k2.run.iterations import TRACKER, last_iteration

NAME = "kimi_k2_phases_cpu"


def _train(log, fails_at=None):
    """Stands for the training of a phase: leaves its last checkpoint's number."""

    def run(recipe, save, start_from, changed):
        log.append((recipe.name, start_from))
        if recipe.name == fails_at:
            return 7
        Path(save).mkdir(parents=True, exist_ok=True)
        (Path(save) / TRACKER).write_text(str(recipe.steps))
        return 0

    return run


def test_every_phase_starts_from_the_one_before_it(tmp_path):
    recipes, log = get_chain(NAME), []
    assert run_chain(places(recipes, tmp_path), [], _train(log)) == 0
    saves = [str(tmp_path / recipe.name) for recipe in recipes]
    assert log == list(zip([r.name for r in recipes], [None, *saves[:-1]], strict=True))
    assert [recipe.previous for recipe in recipes] == [None, *(r.name for r in recipes[:-1])]


def test_a_failed_phase_stops_the_chain_and_the_same_command_goes_on_from_it(tmp_path, capsys):
    recipes, log = get_chain(NAME), []
    runs, broken = places(recipes, tmp_path), recipes[2].name
    assert run_chain(runs, [], _train(log, fails_at=broken)) == 7
    assert [name for name, _ in log] == [r.name for r in recipes[:3]]
    again = []
    assert run_chain(runs, [], _train(again)) == 0
    assert [name for name, _ in again] == [r.name for r in recipes[2:]]
    assert f"{recipes[0].name}: done before" in capsys.readouterr().out
    summary = chain_summary(runs)
    assert f"{recipes[3].steps}/{recipes[3].steps}" in summary
    rows = [line.split() for line in summary.splitlines() if "kimi_k2" in line]
    blends = [row[3] for row in rows]
    assert blends == ["25/25/25/25", "10/30/30/30", "6/18/18/18/40", "6/18/18/18/40"]


def test_the_small_chain_is_the_reports_schedule_scaled_down():
    """Rates at both ends of a phase and sequence lengths keep their ratios."""
    for small, large in zip(get_chain(NAME), kimi_k2_phases(), strict=True):
        phase, ratio = small.phase, get_chain(NAME)[0].phase.lr / 2e-4
        assert phase.lr_at(0) == pytest.approx(large.lr_at(0) * ratio)
        assert phase.lr_at(phase.tokens) == pytest.approx(large.lr_at(large.tokens) * ratio)
        assert phase.seq_length * 4096 == large.seq_length * 64
        assert phase.has_yarn == large.has_yarn


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_of_one_hardware_and_all_phases(name):
    kinds = "phases_sft|phases|pretrain_sft|pretrain_lora"
    kind, where = re.fullmatch(rf"kimi_k2_({kinds})_(.*)", name).groups()
    phases = ["pretrain", "anneal_4k", "long_32k", "yarn_128k"]
    phases = phases[:1] if kind.startswith("pretrain_") else phases
    phases += [kind.rpartition("_")[2]] if kind.endswith(("_sft", "_lora")) else []
    assert list(CHAINS[name]) == [f"kimi_k2_{phase}_{where}" for phase in phases]


SLURM = {
    "sbatch": 'echo "$@" >> {log}; wc -l < {log}',
    "sacct": "printf '1|COMPLETED|00:10:00\\n2|CANCELLED by 0|00:00:01\\n3|RUNNING|00:00:09\\n'",
    "scancel": 'echo "cancel $@" >> {log}',
}


@pytest.fixture
def slurm_log(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands; what they were given."""
    log = tmp_path / "log"
    for name, body in SLURM.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{body.format(log=log)}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return log


def test_jobs_of_a_chain_wait_for_one_another(tmp_path, slurm_log):
    recipes = get_chain(NAME)
    (tmp_path / recipes[0].name).mkdir()
    (tmp_path / recipes[0].name / TRACKER).write_text(str(recipes[0].steps))
    runs = places(recipes, tmp_path)
    scripts = [render(*run, Cluster()) for run in runs]
    assert submit_chain(runs, scripts, []) == ["1", "2", "3"]
    options = [line.rpartition(" ")[0] for line in slurm_log.read_text().splitlines()]
    waits = "--parsable --dependency=singleton,afterok:{} --kill-on-invalid-dep=yes"
    assert options == ["--parsable", waits.format(1), waits.format(2)]
    for recipe, save, start_from in runs[1:]:
        record = json.loads((tmp_path / recipe.name / "recipe.json").read_text())
        assert record["starts_from"] == start_from
        assert len(jobs.jobs_of(save)) == 1


def test_status_logs_and_cancel_know_a_runs_jobs(tmp_path, slurm_log, capsys):
    save = str(tmp_path / "run")
    for number in "123":
        jobs.note(save, number)
    found = jobs.states(jobs.jobs_of(save))
    assert {n: s.name for n, s in found.items()} == {
        "1": "COMPLETED",
        "2": "CANCELLED",
        "3": "RUNNING",
    }
    argv = ["launch", "status", "kimi_k2_pretrain_cpu", "--save", save]
    assert main(argv) == 0
    assert "job 3" in (out := capsys.readouterr().out)
    assert "saved at step 0 of 20" in out
    assert jobs.cancel(save) == ["3"]  # the others have ended
    assert slurm_log.read_text().endswith("cancel 3\n")
    assert main(["launch", "logs", "kimi_k2_pretrain_cpu", "--save", save]) == 2
    assert "the job has not started" in capsys.readouterr().err


def test_without_accounting_the_commands_to_use_by_hand_are_named(monkeypatch, tmp_path):
    (tmp_path / "sacct").write_text("#!/bin/sh\necho storage is disabled >&2; exit 1\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="storage is disabled; by hand: squeue --jobs 8, scancel 8"):
        jobs.states([jobs.SlurmJob("8", "")])


def test_a_run_that_was_never_submitted_has_no_log(tmp_path):
    assert last_iteration(tmp_path) == 0
    with pytest.raises(UserError, match="nothing was submitted"):
        jobs.log_path(str(tmp_path))


def test_options_of_one_run_are_refused_for_a_chain(capsys):
    assert main(["launch", NAME, "--print-args"]) == 2
    assert "is 4 runs" in capsys.readouterr().err
    assert get_recipe("kimi_k2_yarn_128k_cpu").previous in CHAINS[NAME]
