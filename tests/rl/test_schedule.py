"""Temperatures by iteration, and Toggle's phases, by hand."""

import math

import pytest

from megatron_k2.errors import UserError
from megatron_k2.rl.schedule import Temperature, Toggle


def test_kinds_by_hand():
    assert [Temperature.parse("0.8").at(i) for i in (0, 9)] == [0.8, 0.8]
    linear = Temperature.parse("linear:1.0:0.6:4")
    assert [linear.at(i) for i in range(6)] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.6])
    cosine = Temperature.parse("cosine:1:0:2".replace(":0:", ":0.5:"))
    half = 1 - 0.5 * (1 - math.cos(math.pi / 2)) / 2
    assert [cosine.at(i) for i in range(4)] == pytest.approx([1.0, half, 0.5, 0.5])


@pytest.mark.parametrize("text", ["0.8", "linear:1:0.7:100", "cosine:1.2:0.6:50"])
def test_what_is_written_reads_back(text):
    assert str(Temperature.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "0", "nan", "inf", "-1", "linear:1:0.7", "step:1:0.7:3", "linear:1:0.7:0", "a:b"]
)
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(UserError, match="temperature"):
        Temperature.parse(text)


def test_toggle_by_hand():
    toggle = Toggle(iterations=2, accuracy=0.5, percentile=50)
    assert toggle.budget([40, 10, 30, 20]) == 20
    assert toggle.budget([]) is None
    right, lengths = [1.0, 1.0, 0.0], [10, 30, 50]
    assert [toggle.rewards(i, right, lengths, 20) for i in range(5)] == [
        (1.0, 0.0, 0.0),
        (1.0, 0.0, 0.0),
        (1.0, 1.0, 0.0),
        (1.0, 1.0, 0.0),
        (1.0, 0.0, 0.0),
    ]
    assert toggle.rewards(0, [1.0, 0.0, 0.0], [90, 1, 1], 20) == (1.0, 0.0, 0.0)  # seldom right
    assert toggle.rewards(0, right, lengths, None) == (1.0, 1.0, 0.0)


def test_toggle_without_a_phase_is_refused():
    with pytest.raises(UserError, match="phases of 1"):
        Toggle(0, 0.5, 50)
