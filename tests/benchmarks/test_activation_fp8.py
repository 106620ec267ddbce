"""The benchmark runs on a small matrix and ends in its result line. Its figures are not judged."""

import pytest

from tests.benchmarks.running import benchmark_output


@pytest.mark.slow
def test_benchmark_checks_the_bytes_and_prints_floor_and_result():
    arguments = "--rows 64 --width 256 --rounds 1 --dtype bfloat16 --seed 3"
    lines = benchmark_output("activation_fp8", arguments).splitlines()
    assert any("seed=3" in line for line in lines)
    assert lines[-1].startswith("RESULT floor_gbps=")
