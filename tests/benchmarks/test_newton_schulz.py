"""The benchmark runs on a small shape and ends in its result line. Its figures are not judged."""

import pytest

from tests.benchmarks.running import benchmark_output


@pytest.mark.slow
def test_benchmark_prints_inputs_ceiling_and_result():
    arguments = "--shapes 64x128 --rounds 1 --threads 1 --seed 3"
    lines = benchmark_output("newton_schulz", arguments).splitlines()
    assert any("seed=3" in line for line in lines)
    assert any("load_average=" in line for line in lines)
    assert any(line.startswith("ceiling: ") for line in lines)
    assert lines[-1].startswith("RESULT 64x128_error_ratio=")
