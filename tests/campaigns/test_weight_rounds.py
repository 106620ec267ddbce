"""The campaign's short form, and that it sees weights of the round before."""

import pytest

from tests.campaigns import weight_rounds

SHORT = "--preset k2-tiny --rounds 2".split()


@pytest.mark.dist
def test_rounds_are_an_exports_to_the_last_bit(capsys):
    assert weight_rounds.main(SHORT) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if ": 2 rounds of" in line] == [
        *weight_rounds.LAYOUTS
    ]


@pytest.mark.dist
def test_weights_of_the_round_before_are_seen(capsys):
    assert weight_rounds.main([*SHORT, "--layouts", "TP1", "--stale"]) == 1
    assert " 0 tensors not bit-equal" not in capsys.readouterr().out
