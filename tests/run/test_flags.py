"""A flag list read once, against Megatron's own reading of the same list."""

import argparse
from dataclasses import fields

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import add_k2_arguments, expand
from megatron_k2.run.flags import RunFlags, read_flags

TYPED = [
    *("--preset", "k2-tiny", "--save", "runs/a", "--seq-length=128", "--recompute-modules"),
    *("layernorm", "moe_act", "--train-data-path", "0.5", "a", "0.5", "b", "--mock-data"),
    *("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "4"),
]
NOT_SET_BY_PARSING = {"words"}


def test_every_field_has_the_value_that_megatrons_parser_gives_it():
    words = expand(TYPED, cuda=False)
    parser = add_k2_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    theirs, ours = parser.parse_args(words), read_flags(words)
    for name in {field.name for field in fields(RunFlags)} - NOT_SET_BY_PARSING:
        found, expected = getattr(ours, name), getattr(theirs, name, None)
        if f"--{name.replace('_', '-')}" in words:
            assert found == (tuple(expected) if isinstance(expected, list) else expected), name


def test_experts_are_split_as_tensor_parallelism_says_unless_told():
    flags = read_flags(["--tensor-model-parallel-size", "2"])
    assert (flags.layout(4).tp, flags.layout(4).etp, flags.layout(4).data_parallel) == (2, 2, 2)
    told = read_flags([*flags.words, "--expert-tensor-parallel-size", "1"])
    assert told.layout(4).etp == 1


def test_flags_without_values_are_found_by_name_and_numbers_must_be_numbers():
    flags = read_flags(["--muonclip", "--unheard-of", "3"])
    assert "--muonclip" in flags
    assert "--use-distributed-optimizer" not in flags
    with pytest.raises(UserError, match="a size flag has no whole number behind it"):
        read_flags(["--seq-length", "long"])
