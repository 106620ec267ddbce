"""Iteration flags over a preset that counts samples: the preset's curve in as many steps."""

import pytest

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import expand, last_value
from megatron_k2.flags.schedule import ITERATION_FLAGS, SAMPLE_FLAGS

TINY = ["--preset", "k2-tiny", "--mock-data"]
"""240 steps of 16: 20 of warm-up, the last 96 of decay."""


def _counts(*typed):
    words = expand([*TINY, *typed], cuda=False)
    assert not any(last_value(words, flag) for flag in SAMPLE_FLAGS)
    return [None if (v := last_value(words, f)) is None else int(v) for f in ITERATION_FLAGS]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--train-iters", "120"], [120, 10, 120, 48]),
        (["--train-iters", "3"], [3, 0, 3, 1]),
        (["--train-iters=48", "--lr-warmup-iters", "5"], [48, 5, 48, 19]),
        (["--lr-decay-iters", "120"], [240, 10, 120, 48]),
        (["--lr-warmup-iters", "7"], [240, 7, 240, 96]),
        (["--lr-warmup-iters", "7", "--global-batch-size", "32"], [120, 7, 120, 48]),
        (["--train-iters", "120", "--lr-warmup-fraction", "0.5"], [120, None, 120, 48]),
        (["--lr-wsd-decay-iters", "50"], [240, 20, 240, 50]),
    ],
)
def test_an_iteration_flag_displaces_every_sample_flag_of_the_preset(typed, expected):
    assert _counts(*typed) == expected


def test_a_warm_up_by_fraction_displaces_the_presets_samples_alone():
    words = expand([*TINY, "--lr-warmup-fraction", "0.1"], cuda=False)
    assert last_value(words, "--lr-warmup-samples") is None
    assert last_value(words, "--train-samples") == "3840"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--train-iters", "3", "--train-samples", "48"], "--train-iters counts iterations and"),
        (["--lr-warmup-fraction", "0.1", "--lr-warmup-samples", "3"], "both give the warm-up"),
        (["--train-iters", "three"], "--train-iters three: expected a whole number"),
    ],
)
def test_two_ways_to_count_are_refused_by_name(typed, said):
    with pytest.raises(UserError, match=said):
        expand([*TINY, *typed], cuda=False)


def test_megatron_takes_the_flags(monkeypatch):
    """Its own parser and validation; the presets' sample flags beside them are refused there."""
    import sys

    from megatron.training.arguments import parse_args, validate_args

    from megatron_k2.flags.megatron import add_k2_arguments
    from megatron_k2.host.cpu import megatron_host

    words = expand([*TINY, "--train-iters", "12"], cuda=False)
    for flags in (words, [*words, "--train-samples", "192"]):
        monkeypatch.setattr(sys, "argv", ["train", *flags])
        with megatron_host():
            args = parse_args(add_k2_arguments)
            if flags is words:
                validate_args(args)
                assert (args.train_iters, args.lr_warmup_iters) == (12, 1)
            else:
                with pytest.raises(AssertionError):
                    validate_args(args)
