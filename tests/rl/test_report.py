"""A run's history through kills and resumes, its picture, its page."""

import json
import math

import pytest

from megatron_k2.errors import UserError
from megatron_k2.records.rollouts import End
from megatron_k2.rl.history import METRICS, History, Row, read_history
from megatron_k2.rl.record import Group, Segment, Trajectory
from megatron_k2.rl.report import PAGE, PANELS, REPORT, curves, draw, page_rows, write_report

METRICS_OF = (
    *("rl/verdict/sums", "rl/verdict/calls", "eval/sums/sampled", "eval/sums/greedy"),
    *("eval/sums/sampled_tokens", "rl/tokens/sums", "rl/surprise", "learn/mismatch", "learn/kl"),
    *("learn/ptx_nll", "rl/temperature/sums", "seconds/sample", "seconds/step"),
)


def row(n, **more):
    values = {name: 0.1 * place + 0.01 * n for place, name in enumerate(METRICS_OF)}
    return Row(n, n, {**values, **more})


def test_a_history_goes_on_from_its_checkpoint(tmp_path):
    history = History(tmp_path)
    for n in range(6):
        history.add(row(n))
    resumed = History(tmp_path, up_to=4)
    assert len(resumed.before) == 4
    resumed.add(row(4, extra=1.0))
    assert [each.iteration for each in read_history(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert read_history(tmp_path)[4].metrics["extra"] == 1.0
    assert [each.iteration for each in resumed.rows] == [0, 1, 2, 3, 4]


def test_a_torn_line_counts_for_nothing(tmp_path):
    History(tmp_path).add(row(0))
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"iteration": 1, "ver')
    assert len(read_history(tmp_path)) == 1
    History(tmp_path).add(row(1))
    assert [each.iteration for each in read_history(tmp_path)] == [0, 1]


def test_a_line_of_another_kind_is_refused(tmp_path):
    (tmp_path / METRICS).write_text("loss 3\n")
    with pytest.raises(UserError, match=f"{METRICS}:1: not an iteration's metrics"):
        read_history(tmp_path)
    (tmp_path / METRICS).write_text('{"iteration": 3}\n')
    with pytest.raises(UserError, match="not an iteration's metrics"):
        read_history(tmp_path)


def test_what_is_no_number_is_kept_and_is_json(tmp_path):
    History(tmp_path).add(row(0, bad=math.nan, worse=-math.inf))
    json.loads((tmp_path / METRICS).read_text(), parse_constant=lambda name: pytest.fail(name))
    found = read_history(tmp_path)[0].metrics
    assert math.isnan(found["bad"])
    assert found["worse"] == -math.inf


def test_every_panel_has_its_metrics():
    drawn = curves([row(0)], [each for _, beginnings in PANELS for each in beginnings])
    assert set(drawn) == set(METRICS_OF)
    png = draw([row(n) for n in range(40)], "a run")
    assert png.startswith(b"\x89PNG")
    assert draw([row(0)], "one iteration")
    with pytest.raises(UserError, match="not finished its first"):
        draw([], "none")


def test_picture_and_page_of_a_run(tmp_path):
    answers = (
        Trajectory((Segment((1, 2)), Segment((3,), (-1.0,), 4)), 1.0, {"verdict": 1.0}, End.OVER),
        Trajectory(
            (Segment((1, 2)), Segment((9,), (-1.0,), 5)),
            -0.5,
            {"verdict": 0.0, "budget": -0.5},
            End.TOKENS,
        ),
        Trajectory((Segment((1, 2)),), None, {}, End.ENVIRONMENT, "it hung"),
    )
    found = page_rows([Group(7, "sums", "t", answers)], 3, lambda ids: f"<{list(ids)}>")
    assert [each["outcome"] for each in found] == ["right", "wrong", "unknown"]
    assert found[0]["messages"][1] == {"role": "assistant", "name": "version 4", "content": "<[3]>"}
    assert found[1]["evidence"] == "verdict 0, budget -0.5"
    write_report(tmp_path, [row(n) for n in range(3)], found, "a run")
    assert (tmp_path / REPORT).stat().st_size > 10_000
    page = (tmp_path / PAGE).read_text()
    assert "it hung" in page
    assert "rl/verdict/sums" in page
