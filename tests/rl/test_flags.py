"""The command line: what it expands to, and what is refused before anything expensive."""

import argparse

import pytest

from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value
from megatron_k2.rl.checks import check_rl
from megatron_k2.rl.flags import add_rl_arguments, expand
from megatron_k2.rl.settings import LearnerSettings, Objective, settings_from
from megatron_k2.run.flags import read_flags

PRESET = ["--preset", "k2-tiny"]


def _checked(*typed: str, world_size: int = 1) -> None:
    check_rl(read_flags(expand([*PRESET, *typed], cuda=False)), world_size)


def _parsed(*typed: str) -> argparse.Namespace:
    parser = add_rl_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_known_args(expand([*PRESET, *typed], cuda=False))[0]


def test_counts_become_megatrons_and_routers_are_left_alone():
    flags = expand(
        [*PRESET, *"--iterations 50 --prompts-per-iteration 12 --mini-batches 4".split()],
        cuda=False,
    )
    expected = {
        "--train-iters": "200",
        "--global-batch-size": "24",
        "--lr-warmup-iters": "10",
        "--lr": "1e-06",
        "--moe-router-bias-update-rate": "0",
        "--moe-router-load-balancing-type": "none",
        "--train-samples": None,
    }
    assert {name: last_value(flags, name) for name in expected} == expected
    assert "--muonclip" in flags


def test_intervals_count_iterations_of_sampling():
    typed = [*PRESET, *"--mini-batches 4 --save-interval 5 --exit-interval=10".split()]
    flags = expand(typed, cuda=False)
    assert last_value(flags, "--save-interval") == "20"
    assert last_value(flags, "--exit-interval") == "40"


def test_ptx_data_is_the_name_of_packed_sets():
    flags = expand([*PRESET, "--ptx-data", "0.5", "a", "0.5", "b", "--ptx-weight", "1"], cuda=False)
    assert read_flags(flags).sft_data == ("0.5", "a", "0.5", "b")


def test_settings_are_the_defaults_where_nothing_is_said():
    assert settings_from(_parsed()) == LearnerSettings()
    found = settings_from(
        _parsed(*"--policy-loss window --policy-window -1 2 --no-router-replay".split())
    )
    assert found.objective == Objective("window", window=(-1.0, 2.0))
    assert not found.replays_routes
    assert not settings_from(_parsed("--no-shared-prompts")).shares_prompts


def test_a_gpus_fused_router_gives_way_to_replay():
    te = [*PRESET, "--transformer-impl", "transformer_engine"]
    assert "--moe-router-fusion" not in expand(te, cuda=True)
    assert "--moe-router-fusion" in expand([*te, "--no-router-replay"], cuda=True)


def test_a_run_of_defaults_is_accepted():
    _checked()
    _checked("--use-distributed-optimizer", world_size=2)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--prompts-per-iteration 5 --mini-batches 2", "does not divide by --mini-batches 2"),
        ("--iterations 0", "--iterations 0: expected a whole number above 0"),
        ("--overlap-param-gather", "weights are read between steps"),
        ("--async-save", "--async-save with reinforcement learning"),
        ("--micro-batch-size 2", "a pack fills its row"),
        ("--moe-router-fusion", "add --no-router-replay"),
        ("--ptx-weight 0.1", "without --ptx-data"),
        ("--ptx-data a", "without --ptx-weight"),
        (
            "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3",
            "a mean over whoever shares a row",
        ),
    ],
)
def test_what_does_not_go_is_refused_with_the_way_out(typed, expected):
    with pytest.raises(UserError, match=expected):
        _checked(*typed.split())


def test_answers_that_do_not_divide_are_named_by_the_flags_that_made_them():
    with pytest.raises(UserError, match=r"256 answers a step .*multiple of the 3 data-parallel"):
        _checked(world_size=3)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--policy-tau 0", "--policy-tau 0.0: expected more than 0"),
        ("--policy-window 0.1 0.5", "on either side of 0"),
        ("--ptx-weight -1", "--ptx-weight -1.0: expected 0 or more"),
    ],
)
def test_a_number_outside_its_range_is_named(typed, expected):
    with pytest.raises(UserError, match=expected):
        settings_from(_parsed(*typed.split()))
