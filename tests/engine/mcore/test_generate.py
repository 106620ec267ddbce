import pytest

from megatron_k2.engine.mcore.jobs import check_length, round_up
from megatron_k2.engine.mcore.options import evaluate_parser, without_nproc
from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import Layout


def test_lengths_beyond_the_models_positions_are_refused():
    check_length(10, 54, 64)
    with pytest.raises(UserError, match="at most 54 new tokens"):
        check_length(10, 55, 64)
    with pytest.raises(UserError, match="empty"):
        check_length(0, 1, 64)


def test_lengths_are_rounded_to_what_the_layout_cuts():
    assert round_up(5, Layout()) == 5
    assert round_up(5, Layout(tp=2)) == 6
    assert round_up(5, Layout(cp=2, tp=2)) == 8


def test_ranks_are_not_told_nproc_and_abbreviations_are_refused(capsys):
    assert without_nproc(["--load", "a", "--nproc", "2", "--data", "b"]) == [
        *["--load", "a", "--data", "b"]
    ]
    with pytest.raises(SystemExit):
        evaluate_parser().parse_args(["--load", "a", "--data", "b", "--npro", "2"])
    assert "--npro" in capsys.readouterr().err
