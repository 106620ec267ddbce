"""The step benchmark starts both sides from the same model and ends in its result line."""

import pytest

from tests.benchmarks.running import benchmark_output


@pytest.mark.slow
def test_both_sides_start_with_the_same_loss_and_the_result_line_is_last():
    pytest.importorskip("transformers")
    lines = benchmark_output("train_step", "--batch 1 --seq 32 --rounds 1 --seed 3").splitlines()
    assert any("seed=3" in line for line in lines)
    assert any(line.startswith("peer: transformers ") for line in lines)
    assert any(line.startswith("first loss: ") for line in lines)
    assert any(line.startswith("ceiling: ") for line in lines)
    assert lines[-1].startswith("RESULT forward_backward_ratio=")
