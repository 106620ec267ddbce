"""What an import saves as Megatron's arguments, held against Megatron's own parser."""

import contextlib
import dataclasses
import io
import sys

import pytest

from megatron_k2.checkpoint.hf.config import preset_from_args
from megatron_k2.checkpoint.torch_dist import imported_args as room
from megatron_k2.checkpoint.torch_dist.archive import read_object, write_object
from megatron_k2.checkpoint.torch_dist.imported_args import imported_args
from megatron_k2.flags.megatron import add_k2_arguments, model_flags, platform_flags
from megatron_k2.host.cpu import megatron_host
from megatron_k2.presets import K2_TINY, KIMI_K2, MOONLIGHT_16B_A3B

GROUPS = {"n_group": 4, "topk_group": 2}
CASES = {
    "kimi-k2": (KIMI_K2, {}, True),
    "no q_lora, plain rotary": (MOONLIGHT_16B_A3B, {}, True),
    "fp32, epsilon of its own": (dataclasses.replace(K2_TINY, norm_epsilon=1e-5), {}, False),
    "groups of experts": (K2_TINY, GROUPS, True),
}


def megatrons(preset, config, is_bf16):
    """Parsed and validated by Megatron, from the same flags."""
    from megatron.training.arguments import parse_args, validate_args

    context = preset.max_position_embeddings
    flags = f"""--preset {preset.name} --vocab-size {preset.vocab_size} --seq-length {context}
        --max-position-embeddings {context} --micro-batch-size 1 --train-iters 1 --lr 1e-4
        --tokenizer-type NullTokenizer""".split()
    if config:
        flags += "--moe-router-num-groups 4 --moe-router-group-topk 2".split()
    flags += ["--bf16"] if is_bf16 else []
    before = sys.argv
    sys.argv = ["", *platform_flags(cuda=False), *model_flags(preset, yarn=bool(preset.yarn))]
    sys.argv += flags
    try:
        with megatron_host(), contextlib.redirect_stdout(io.StringIO()):
            args = parse_args(add_k2_arguments)
            validate_args(args)
    finally:
        sys.argv = before
    args.padded_vocab_size = preset.vocab_size
    return vars(args)


def saved_args(preset, config, is_bf16):
    """As a run finds them in the checkpoint."""
    from megatron_k2.engine.mcore.saved_args import true_class

    content = io.BytesIO()
    write_object(content, imported_args(preset, config, is_bf16=is_bf16))
    return read_object(content.getbuffer(), true_class)


def fields(config):
    """Name and value of a built configuration's fields, those of its transformer too.

    Without functions, which are made anew each time.
    """
    own = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    inner = config.transformer
    own += [(field.name, getattr(inner, field.name)) for field in dataclasses.fields(inner)]
    return [(n, value) for n, value in own if n != "transformer" and not callable(value)]


@pytest.mark.parametrize(("preset", "config", "is_bf16"), CASES.values(), ids=CASES)
def test_every_argument_is_what_megatron_makes_of_the_flags(preset, config, is_bf16, monkeypatch):
    expected = megatrons(preset, config, is_bf16)
    saved = vars(saved_args(preset, config, is_bf16))
    assert {name: expected.get(name) for name in saved} == saved
    # a switch read the wrong way round would be seen
    monkeypatch.setattr(room, "_SWITCHES_OFF", ())
    wrong = vars(saved_args(preset, config, is_bf16))
    assert {k for k in wrong if wrong[k] != expected.get(k)} == {"add_bias_linear"}


@pytest.mark.parametrize(("preset", "config", "is_bf16"), CASES.values(), ids=CASES)
def test_the_model_megatron_builds_from_them_is_the_one_of_the_flags(preset, config, is_bf16):
    """What is not saved is Megatron's default, which says the same."""
    from argparse import Namespace

    from megatron_k2.engine.mcore.saved_args import model_args
    from megatron_k2.model.build import model_config_from_args
    from megatron_k2.parallel.layout import Layout

    saved = saved_args(preset, config, is_bf16)
    whole = Namespace(**megatrons(preset, config, is_bf16))
    ours, theirs = (
        model_config_from_args(model_args(args, Layout(), cuda=False)) for args in (saved, whole)
    )
    assert ours.bf16 == is_bf16
    different = {
        name: (ours_value, theirs_value)
        for (name, ours_value), (_, theirs_value) in zip(fields(ours), fields(theirs), strict=True)
        if ours_value != theirs_value
    }
    assert not different


@pytest.mark.parametrize(("preset", "config", "is_bf16"), CASES.values(), ids=CASES)
def test_the_preset_comes_back_from_them(preset, config, is_bf16):
    saved = saved_args(preset, config, is_bf16)
    other = K2_TINY if preset is not K2_TINY else MOONLIGHT_16B_A3B
    shape = {"training", "name", "source", "bos_token_id", "eos_token_id", "moe_aux_loss_coeff"}
    found = preset_from_args(saved, dataclasses.replace(other, yarn=preset.yarn))
    different = {
        field.name
        for field in dataclasses.fields(preset)
        if getattr(found, field.name) != getattr(preset, field.name)
    }
    assert different <= shape
