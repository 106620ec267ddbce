"""The report of a run written by hand, whose every figure can be worked out on paper."""

import importlib.util
import json
import math
import shlex

import numpy as np
import pytest

from megatron_k2.cli import main as cli
from megatron_k2.engine.mcore.options import chat_parser, evaluate_parser, generate_parser
from megatron_k2.errors import UserError
from megatron_k2.run.metrics import METRICS_FILE, MetricsWriter, StepRecord
from megatron_k2.run.report.figure import smoothed
from megatron_k2.run.report.run import read_run
from megatron_k2.run.report.summary import (
    finish,
    next_commands,
    summarise,
    summary,
    write_heads,
    write_report,
)

PNG = b"\x89PNG\r\n\x1a\n"


def _record(iteration, **changes):
    fields = {
        "iteration": iteration,
        "consumed_samples": 16 * iteration,
        "consumed_tokens": 4096 * iteration,
        "loss": 9.0 - iteration,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "is_skipped": False,
        "seconds": 2.0,
        "tokens_per_second": 1000.0 * iteration,
        "max_logit_per_layer": (1.0, 2.0 * iteration),
        "num_clipped_heads": iteration,
        "num_nonfinite_heads": 0,
        "smallest_clip_factor": 1.0,
        "load_max_over_mean_per_layer": (1.5,),
    }
    return StepRecord(**(fields | changes))


def _write(directory, records, run_record=None):
    writer = MetricsWriter(directory)
    for record in records:
        writer.write(record)
    if run_record is not None:
        (directory / "run.json").write_text(json.dumps(run_record))
    return directory


@pytest.fixture
def run_dir(tmp_path):
    return _write(tmp_path, [_record(i) for i in (1, 2, 3, 4, 5)])


def test_the_summary_says_what_the_records_add_up_to(run_dir):
    assert summary(run_dir).splitlines() == [
        "steps      5",
        "tokens     20,480",
        "loss       8.0000 -> 4.0000, best 4.0000 at step 5",
        "max logit  10.00 at the end, 15 head-steps clipped in all",
        "speed      3,000 tokens/s (median)",
        "time       0:10",
    ]


def test_the_best_loss_is_the_lowest_and_not_the_last(tmp_path):
    _write(tmp_path, [_record(1), _record(2, loss=3.5), _record(3, loss=3.75)])
    assert "8.0000 -> 3.7500, best 3.5000 at step 2" in summary(tmp_path)


def test_steps_without_a_loss_are_left_out_and_skipped_ones_counted(tmp_path):
    nan = _record(3, loss=math.nan, is_skipped=True)
    _write(tmp_path, [_record(1), _record(2), nan])
    text = summary(tmp_path)
    assert "steps      3, 1 skipped" in text
    assert "8.0000 -> 7.0000, best 7.0000 at step 2" in text


def test_a_resumed_run_whose_start_is_lost_says_so(tmp_path):
    _write(tmp_path, [_record(101), _record(102)])
    assert "steps      102 (recorded from 101)" in summary(tmp_path)


def test_the_recorded_threshold_wins_over_the_option(tmp_path):
    _write(tmp_path, [_record(1)], {"qk_clip_threshold": 20.0, "preset": "k2-tiny"})
    assert read_run(tmp_path, threshold=7.0).threshold == 20.0
    assert "(threshold 20)" in summary(tmp_path)


def test_the_option_serves_where_no_threshold_is_recorded(tmp_path):
    _write(tmp_path, [_record(1)], {"qk_clip_threshold": None})
    assert read_run(tmp_path, threshold=7.0).threshold == 7.0
    assert read_run(tmp_path).threshold is None


def test_without_matplotlib_a_run_ends_with_its_summary_and_says_what_draws_it(
    run_dir, monkeypatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    assert "not drawn, for which matplotlib is needed" in finish(run_dir)
    assert not (run_dir / "report.png").exists()


def test_finish_draws_the_picture_and_names_the_next_commands(tmp_path):
    directory = tmp_path / "my run"
    directory.mkdir()
    flags = ["--preset", "k2-tiny", "--data", "old", "--data", "/tmp/corpus"]
    _write(directory, [_record(1), _record(2)], {"flags": flags, "preset": "k2-tiny"})
    text = finish(directory)
    assert (directory / "report.png").read_bytes().startswith(PNG)
    assert str(directory / "report.png") in text
    for command in next_commands(read_run(directory)):
        assert command in text
        assert f"'{directory}" in command
        assert command.split()[1] in cli.VERBS
    assert "--data /tmp/corpus" in text


def test_the_next_commands_are_ones_the_verbs_understand(run_dir):
    evaluate, generate, *_ = (shlex.split(c)[2:] for c in next_commands(read_run(run_dir)))
    assert evaluate_parser().parse_args(evaluate).load == run_dir
    assert generate_parser().parse_args(generate).prompt == "def main("


def test_of_a_fine_tuned_run_one_talks_to_the_model(tmp_path):
    _write(tmp_path, [_record(1)], {"flags": ["--preset", "k2-tiny", "--sft-data", "set"]})
    chat, export, report = next_commands(read_run(tmp_path))
    assert chat_parser().parse_args(shlex.split(chat)[2:]).load == tmp_path
    assert export.startswith("megatron-k2 convert export ")
    assert report == f"megatron-k2 report {tmp_path}"


@pytest.mark.parametrize(
    "records",
    [
        [_record(1)],
        [_record(1, max_logit_per_layer=(), load_max_over_mean_per_layer=())],
        [_record(1), _record(2, loss=math.nan, max_logit_per_layer=(-math.inf, -math.inf))],
        [_record(i, max_logit_per_layer=(1.0,) * 61) for i in (1, 2)],
        [_record(1), _record(2, load_max_over_mean_per_layer=())],
        [_record(1, loss=math.inf)],
    ],
    ids=["one_step", "no_tables", "nothing_finite", "61_layers", "layers_change", "inf"],
)
def test_unusual_runs_are_drawn_too(tmp_path, records):
    run = read_run(_write(tmp_path, records), threshold=20.0)
    assert summarise(run)
    write_report(run, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)


def test_a_failed_drawing_leaves_the_old_picture(run_dir, monkeypatch):
    (run_dir / "report.png").write_bytes(b"old")
    monkeypatch.setattr("megatron_k2.run.report.figure._speed", None)
    with pytest.raises(TypeError):
        finish(run_dir)
    assert (run_dir / "report.png").read_bytes() == b"old"
    assert sorted(path.name for path in run_dir.iterdir()) == [METRICS_FILE, "report.png"]


def test_the_running_mean_starts_at_the_first_value_and_skips_gaps():
    """Against the weighted mean written out; without the correction it would start near zero."""
    values = [4.0, math.nan, 2.0, 6.0]
    decay = 0.75
    mean = smoothed(values)
    assert mean[0] == mean[1] == pytest.approx(4.0)
    weights = np.array([decay**2, decay, 1.0])
    assert mean[3] == pytest.approx(np.average([4.0, 2.0, 6.0], weights=weights))
    uncorrected = (1 - decay) * 4.0
    assert abs(uncorrected - mean[0]) > 1


def test_a_directory_without_metrics_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(UserError, match="does not exist"):
        summary(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "pretrain --save" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_broken_run_record_is_refused_by_name(run_dir):
    (run_dir / "run.json").write_text('{"qk_clip')
    with pytest.raises(UserError, match=r"run\.json is not JSON"):
        summary(run_dir)


def test_the_verb_writes_where_it_is_told(run_dir, capsys):
    output = run_dir / "pictures" / "one.png"
    assert cli.main(["report", str(run_dir), "--output", str(output), "--threshold", "9"]) == 0
    assert output.read_bytes().startswith(PNG)
    assert "(threshold 9)" in capsys.readouterr().out
    assert not (run_dir / "report.png").exists()


def test_another_ending_than_png_is_refused(run_dir, capsys):
    assert cli.main(["report", str(run_dir), "--output", "x.jpg"]) == 2
    assert "ends in .png" in capsys.readouterr().err


def test_every_heads_picture_is_drawn_from_its_own_file(tmp_path):
    _write(tmp_path, [_record(1), _record(2)])
    assert write_heads(read_run(tmp_path)) is None, "nothing recorded yet"
    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.write_max_logits(step, [[1.0 * step, 2.0], [-math.inf, 3.0]])
    path = write_heads(read_run(tmp_path, threshold=2.0))
    assert path.read_bytes().startswith(PNG)
    assert write_heads(read_run(tmp_path)).read_bytes() != b"", "also without a threshold"
