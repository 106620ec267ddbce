"""The verb: quick, without torch; and a CPU twin really trained by it."""

import gzip
import json
import subprocess
import sys

import pytest

from megatron_k2.cli.main import main
from megatron_k2.launch.local import RECIPE_RECORD
from megatron_k2.launch.overrides import apply
from megatron_k2.launch.table import resolved
from megatron_k2.recipes import get_recipe
from megatron_k2.run.commit import git_commit
from megatron_k2.run.metrics import METRICS_FILE, read_records
from megatron_k2.run.record import RUN_RECORD

DRY_RUN = "launch kimi_k2_pretrain_256gpu_h800 --executor slurm --dry-run".split()


def test_a_dry_run_imports_neither_torch_nor_nemo_run():
    code = (
        "import sys; from megatron_k2.cli.main import main; "
        f"assert main({DRY_RUN}) == 0; "
        "print(sorted({'torch', 'megatron', 'nemo_run'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_table_says_what_will_run_and_what_differs(capsys):
    assert main(DRY_RUN) == 0
    text = " ".join(capsys.readouterr().out.split())  # the table is wrapped
    for words in (
        "16,384 x 4,096 = 67,108,864 tokens a step",
        "in 230,967 steps",
        "TP 1, PP 16, VPP 2, EP 16",
        "planner: data sheet times assumed efficiencies, not measured",
        "#SBATCH --signal=B:USR1@600",
        "tensorboard --logdir runs/kimi_k2_pretrain_256gpu_h800",
    ):
        assert words in text


@pytest.mark.slow
def test_a_chains_dry_run_shows_every_script(capsys):
    assert main("launch kimi_k2_phases_256gpu_h200 --dry-run".split()) == 0
    assert capsys.readouterr().out.count("#SBATCH --job-name=kimi_k2_") == 4


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--executor local --account k2", "--account with --executor local"),
        ("--executor local --profile site.yaml", "--profile with --executor local"),
        ("--executor local --detach", "--detach without --nemo-run"),
        ("--executor local --nodes 2", "--nodes with --executor local"),
    ],
)
def test_what_only_another_executor_understands_is_refused(words, complaint, capsys):
    assert main(["launch", "kimi_k2_pretrain_cpu", *words.split()]) == 2
    assert complaint in capsys.readouterr().err


def test_the_state_of_a_run_that_is_not_here_says_so(capsys, tmp_path):
    argv = ["launch", "status", "kimi_k2_pretrain_cpu", "--save", str(tmp_path / "none")]
    assert main(argv) == 0
    assert "not launched here" in capsys.readouterr().out


def test_a_cluster_recipe_is_not_run_here(capsys):
    assert main("launch kimi_k2_yarn_128k_512gpu_h800 --executor local".split()) == 2
    assert "twin for this machine is kimi_k2_yarn_128k_cpu" in capsys.readouterr().err


def test_a_phase_without_its_previous_one_is_refused(capsys, tmp_path):
    argv = f"launch kimi_k2_anneal_4k_cpu --executor local --save {tmp_path}/b"
    assert main(f"{argv} --start-from {tmp_path}/a".split()) == 2
    assert "run kimi_k2_pretrain_cpu first" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_a_twin_trains_leaves_its_record_and_the_next_phase_goes_on_from_it(tmp_path):
    save = tmp_path / "run"
    steps = ["--set", "phase.tokens=8192"]  # four steps
    decay = ["--set", "phase.decay_tokens=4096"]
    argv = ["launch", "kimi_k2_pretrain_cpu", "--executor", "local", "--save", str(save)]
    data = ["--set", f"data.root={tmp_path}/data"]
    trace = [("tool", "pytorch"), ("first_step", 2), ("last_step", 3)]
    traced = [word for key, value in trace for word in ("--set", f"profiler.{key}={value}")]
    assert main([*argv, *steps, *decay, *data, *traced]) == 0
    with gzip.open(save / "torch_profile" / "rank-0.json.gz", "rt") as file:
        events = {event["name"] for event in json.load(file)["traceEvents"]}
    steps_traced = {name for name in events if name.startswith("ProfilerStep")}
    assert steps_traced == {"ProfilerStep#2", "ProfilerStep#3"}
    assert "aten::mm" in events
    records = read_records(save / METRICS_FILE)
    assert [r.iteration for r in records] == [1, 2, 3, 4]
    assert max(r.learning_rate for r in records) == pytest.approx(4e-3)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "4"
    record = json.loads((save / RECIPE_RECORD).read_text())
    assert record["recipe"] == "kimi_k2_pretrain_cpu"
    assert record["values"]["phase.tokens"] == 8192
    assert record["versions"]["megatron-core"].startswith("0.19")
    assert record["git_commit"] == git_commit()
    recipe = apply(get_recipe("kimi_k2_pretrain_cpu"), record["set"])
    assert record["values"] == json.loads(json.dumps(resolved(recipe)))
    assert record["flags"] == json.loads((save / RUN_RECORD).read_text())["flags"]  # as they ran
    second = tmp_path / "second"
    argv = ["launch", "kimi_k2_anneal_4k_cpu", "--executor", "local", "--save", str(second)]
    assert main([*argv, "--start-from", str(save), *data]) == 0
    assert "--keep-optimizer" in json.loads((second / RECIPE_RECORD).read_text())["flags"]
    continued = read_records(second / METRICS_FILE)
    assert [r.iteration for r in continued] == [1, 2, 3, 4]
    assert continued[0].loss < (records[0].loss + records[-1].loss) / 2  # not random weights again
    assert 4e-4 > continued[0].learning_rate > continued[-1].learning_rate
