"""A parser that raises its sentence, with the flag that was meant."""

import argparse

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.flags.refusing import refusing


def _declare(parser):
    parser.add_argument("--synthetic-data", action="store_true")
    parser.add_argument("--seq-length", type=int)
    return parser


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--synthetc-data"], r"unrecognized arguments: --synthetc-data; did you mean --synthetic"),
        (["--synthetic-data", "DIR"], "unrecognized arguments: DIR; a flag before it takes no"),
        (["--seq-length", "x"], "argument --seq-length: invalid int value: 'x'$"),
        (["--zzz"], "unrecognized arguments: --zzz$"),
    ],
)
def test_what_argparse_would_print_is_raised(argv, said):
    with pytest.raises(UserError, match=said):
        refusing(_declare)(argparse.ArgumentParser()).parse_args(argv)
    with pytest.raises(SystemExit):  # and nobody reads its stderr
        _declare(argparse.ArgumentParser()).parse_args(argv)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_mistyped_flag_is_named_on_the_terminal(ranks, tmp_path, capfd):
    argv = "pretrain --preset k2-tiny --synthetc-data --train-iters 1".split()
    assert main([*argv, "--save", str(tmp_path / "run"), "--nproc", ranks]) == 2
    said = capfd.readouterr()
    whole = said.out + said.err
    assert "did you mean --synthetic-data?" in whole
    assert "Traceback" not in whole
