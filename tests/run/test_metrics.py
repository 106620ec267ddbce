"""``metrics.jsonl`` after kills and resumes. Not exercised: fsync."""

import math
from dataclasses import replace

import pytest

from megatron_k2.errors import UserError
from megatron_k2.run.metrics import (
    MAX_LOGITS_FILE,
    METRICS_FILE,
    MetricsWriter,
    StepRecord,
    read_max_logits,
    read_records,
)

RECORD = StepRecord(
    iteration=1,
    consumed_samples=16,
    consumed_tokens=4096,
    loss=0.1 + 0.2,
    learning_rate=1e-3 / 3,
    grad_norm=2.0**-1074,
    is_skipped=False,
    seconds=0.7,
    tokens_per_second=1e5 / 7,
    max_logit_per_layer=(1 / 3, 19.999999999999996),
    num_clipped_heads=2,
    num_nonfinite_heads=0,
    smallest_clip_factor=0.1,
    load_max_over_mean_per_layer=(1.25,),
)


def _write(path, iterations, **changes):
    writer = MetricsWriter(path.parent)
    for iteration in iterations:
        writer.write(replace(RECORD, iteration=iteration, **changes))


def _iterations(path):
    return [record.iteration for record in read_records(path)]


def test_every_float_reads_back_bit_for_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path.parent).write(RECORD)
    assert read_records(path) == [RECORD]


def test_infinite_and_missing_values_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path.parent).write(
        replace(RECORD, loss=math.nan, max_logit_per_layer=(-math.inf,))
    )
    (found,) = read_records(path)
    assert math.isnan(found.loss)
    assert found.max_logit == -math.inf


def test_a_resumed_run_drops_what_was_written_past_its_checkpoint(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    _write(path, range(1, 8), loss=1.0)
    _write(path, range(5, 7), loss=2.0)
    assert _iterations(path) == [1, 2, 3, 4, 5, 6]
    assert [record.loss for record in read_records(path)] == [1.0] * 4 + [2.0] * 2


def test_a_killed_and_resumed_run_has_the_bytes_of_one_that_was_not(tmp_path):
    whole, killed = (tmp_path / name / METRICS_FILE for name in ("whole", "killed"))
    _write(whole, range(1, 9))
    _write(killed, range(1, 7))
    killed.write_bytes(killed.read_bytes()[:-40])
    _write(killed, range(4, 9))
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_last_line_cut_short_is_left_out(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-cut])
    assert _iterations(path) == ([1, 2] if cut == 1 else [1])


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2, 3])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], lines[2], ""]))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a record"):
        _write(path, [4])
    assert path.read_bytes() == before


def test_a_missing_file_has_no_records(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == []


def test_maxima_are_over_layers_and_defined_without_any():
    assert RECORD.max_logit == 19.999999999999996
    assert RECORD.load_max_over_mean == 1.25
    empty = replace(RECORD, max_logit_per_layer=(), load_max_over_mean_per_layer=())
    assert empty.max_logit == -math.inf
    assert empty.load_max_over_mean == 1.0


def test_every_heads_maximum_is_kept_a_log_interval_and_trimmed_with_the_records(tmp_path):
    for start in (1, 2):  # the second run resumed from a checkpoint after iteration 1
        writer = MetricsWriter(tmp_path)
        for iteration in range(start, 4):
            writer.write_max_logits(iteration, [[1.0 * start, 2.123456], [-math.inf, 4.0]])
    found = read_max_logits(tmp_path / MAX_LOGITS_FILE)
    assert [iteration for iteration, _ in found] == [1, 2, 3]
    assert [table[0] for _, table in found] == [[1.0, 2.1235], [2.0, 2.1235], [2.0, 2.1235]]
