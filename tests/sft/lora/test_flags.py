"""What a command line with adapters expands to: its base, and what a second start makes of it."""

from pathlib import Path

import pytest

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import expand
from megatron_k2.flags.words import last_value
from megatron_k2.run.flags import read_flags
from megatron_k2.run.iterations import METADATA, point_tracker
from megatron_k2.run.record import RUN_RECORD, write_record
from megatron_k2.training.preflight import check_run

SMALL = "--preset k2-tiny --mock-data --vocab-size 128".split()
LORA = ["--lora-rank", "8"]


def make_run(directory: Path, *steps: int, flags: tuple[str, ...] = ()) -> Path:
    """Checkpoints as far as a command line looks at them."""
    for step in steps:
        iteration = directory / f"iter_{step:07d}"
        iteration.mkdir(parents=True)
        (iteration / METADATA).write_bytes(b"")
        (iteration / "metadata.json").write_text("{}")
        (iteration / "common.pt").write_bytes(b"")
    point_tracker(directory, str(steps[-1]))
    write_record(directory / RUN_RECORD, {"flags": [*flags]})
    return directory


@pytest.fixture
def base(tmp_path):
    return make_run(tmp_path / "base", 10, 20)


def adapters_over(base: Path, directory: Path, step: int = 20) -> Path:
    words = (*LORA, "--lora-base", str(base / f"iter_{step:07d}"))
    return make_run(directory, 5, flags=words)


def expanded(*words):
    return expand([*SMALL, *words], cuda=False)


def test_a_whole_model_that_is_loaded_becomes_the_base(base):
    flags = expanded(*LORA, "--load", str(base), "--finetune", "--no-load-optim")
    assert last_value(flags, "--lora-base") == str(base / "iter_0000020")
    assert last_value(flags, "--load") is None
    assert "--finetune" not in flags
    assert "--no-load-optim" not in flags
    assert last_value(flags, "--moe-router-bias-update-rate") == "0"
    assert last_value(flags, "--moe-router-load-balancing-type") == "none"
    at = expanded(*LORA, "--load", str(base), "--ckpt-step", "10")
    assert last_value(at, "--lora-base") == str(base / "iter_0000010")
    assert last_value(at, "--ckpt-step") is None


def test_expanding_twice_changes_nothing(base):
    once = expanded(*LORA, "--load", str(base))
    again = expand(once, cuda=False)
    flags = ("--lora-base", "--load", "--moe-router-bias-update-rate", "--lora-rank")
    assert [last_value(once, f) for f in flags] == [last_value(again, f) for f in flags]


def test_adapters_that_are_loaded_bring_their_base(base, tmp_path):
    run = adapters_over(base, tmp_path / "run", 10)
    flags = expanded(*LORA, "--load", str(run), "--finetune")
    assert last_value(flags, "--lora-base") == str(base / "iter_0000010")
    assert last_value(flags, "--load") == str(run)
    assert "--finetune" in flags


def test_a_second_start_keeps_the_base_it_began_on(base, tmp_path):
    save = adapters_over(base, tmp_path / "save", 10)
    flags = expanded(*LORA, "--load", str(base), "--save", str(save))
    assert last_value(flags, "--lora-base") == str(base / "iter_0000010"), "not the later one"
    assert last_value(flags, "--load") == str(save)
    anew = expanded(*LORA, "--load", str(base), "--save", str(save), "--start-over")
    assert last_value(anew, "--lora-base") == str(base / "iter_0000020")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*LORA], "--lora-rank without weights to stand on"),
        (["--lora-alpha", "8"], "--lora-alpha without --lora-rank"),
        (["--lora-base-fp8"], "--lora-base-fp8 without --lora-rank"),
        (
            [*LORA, "--load", "{base}", "--lora-base-fp8", "--fp8-activation-storage"],
            "both decide what backward keeps",
        ),
        ([*LORA, "--load", "{base}", "--delay-wgrad-compute"], "no gradient to delay"),
        (["--load", "{run}"], "holds adapters alone: give --lora-rank"),
        ([*LORA, "--load", "{other}", "--save", "{run}"], "its adapters stand on"),
        ([*LORA, "--load", "{base}", "--save", "{other}"], "holds a run without adapters"),
        ([*LORA, "--load", "{run}", "--lora-base", "{other}"], "its adapters stand on"),
        ([*LORA, "--load", "/nowhere"], "to stand on .*nowhere is not there"),
        (["--lora-rank", "0", "--load", "{base}"], "--lora-rank 0: expected at least 1"),
        ([*LORA, "--load", "{base}", "--lora-targets", "router"], "the router stays"),
        (
            [*LORA, "--load", "{base}", "--fp8-format", "hybrid"],
            "adapters stand beside Megatron's",
        ),
    ],
)
def test_what_cannot_be_is_refused(base, tmp_path, words, said):
    names = {
        "base": base,
        "other": make_run(tmp_path / "other", 3),
        "run": adapters_over(base, tmp_path / "run"),
    }
    with pytest.raises(UserError, match=said):
        check_run(read_flags(expanded(*(word.format(**names) for word in words))), 1)


def test_a_base_of_another_model_is_refused(base):
    write_record(base / RUN_RECORD, {"flags": [], "preset": "k2-tiny", "shape": {"num_layers": 9}})
    with pytest.raises(UserError, match="num_layers 9 there"):
        check_run(read_flags(expanded(*LORA, "--load", str(base))), 1)
