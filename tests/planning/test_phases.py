"""The schedule against the report's table and against Megatron's own scheduler.

Both compute in fp64 in another order: 1e-12 relative.
"""

import itertools
import math
from dataclasses import replace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import training_flags
from megatron_k2.planning.phases import Phase, kimi_k2_phases, scaled_down
from megatron_k2.presets import get_preset

PHASES = {phase.name: phase for phase in kimi_k2_phases()}
PRETRAIN = PHASES["pretrain"]
T, B = 10**12, 10**9


def _flag(phase: Phase, name: str) -> str:
    flags = phase.megatron_flags()
    return flags[flags.index(name) + 1]


def upstream_lr(phase: Phase, samples: int) -> float:
    """What Megatron's scheduler sets from this phase's flags after ``samples`` sequences."""
    optimizer = type("Optimizer", (), {"param_groups": [{}]})()
    style = _flag(phase, "--lr-decay-style")
    is_wsd = style == "WSD"
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=float(_flag(phase, "--lr")),
        min_lr=float(_flag(phase, "--min-lr")),
        lr_warmup_steps=int(_flag(phase, "--lr-warmup-samples")),
        lr_decay_steps=int(_flag(phase, "--lr-decay-samples")),
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=int(_flag(phase, "--lr-wsd-decay-samples")) if is_wsd else None,
        lr_wsd_decay_style="cosine" if is_wsd else None,
    )
    scheduler.step(samples)
    return scheduler.get_lr({})


@pytest.mark.parametrize(
    ("phase", "tokens", "lr"),
    [
        ("pretrain", 500 * 2**26, 2e-4),
        ("pretrain", 250 * 2**26, 1e-4),
        ("pretrain", 10 * T, 2e-4),
        ("pretrain", 10 * T + 2.75 * T, 1.1e-4),
        ("pretrain", 15.5 * T, 2e-5),
        ("anneal-4k", 0, 2e-5),
        ("long-32k", 60 * B, 7e-6),
        ("yarn-128k", 0, 7e-6),
    ],
)
def test_the_rate_is_the_reports_at_its_boundaries(phase, tokens, lr):
    assert PHASES[phase].lr_at(tokens) == pytest.approx(lr, rel=1e-12)


def test_the_curve_has_no_jump_between_phases():
    for before, after in itertools.pairwise(kimi_k2_phases()):
        assert before.lr_at(before.tokens) == pytest.approx(after.lr_at(0), rel=1e-12)
    apart = replace(PHASES["long-32k"], lr=2e-5)
    assert apart.lr_at(0) != pytest.approx(PHASES["anneal-4k"].lr_at(400 * B), rel=1e-2)


@pytest.mark.parametrize("phase", list(PHASES.values()), ids=list(PHASES))
@pytest.mark.parametrize("part", [0.0005, 0.002, 0.3, 0.645, 0.66, 0.9, 1.0])
def test_megatrons_scheduler_sets_the_same_rate_from_the_flags(phase, part):
    samples = int(phase.tokens / phase.seq_length * part)
    expected = phase.lr_at(samples * phase.seq_length)
    # Megatron counts whole sequences of 15.5T tokens: at most one of 4096, 3e-10 of the curve.
    assert upstream_lr(phase, samples) == pytest.approx(expected, rel=1e-8)


def test_a_linear_decay_instead_of_the_cosine_would_be_seen():
    linear = replace(PRETRAIN, shape="linear", warmup_tokens=0)
    samples = int(12 * T / 4096)
    assert upstream_lr(PRETRAIN, samples) != pytest.approx(linear.lr_at(12 * T), rel=1e-2)


def test_steps_batches_and_sequences_are_those_of_the_report():
    assert [phase.steps for phase in kimi_k2_phases()] == [230_968, 5_961, 895, 300]
    assert [phase.sequences_per_step for phase in kimi_k2_phases()] == [16384, 16384, 2048, 512]
    assert [phase.has_yarn for phase in kimi_k2_phases()] == [False, False, False, True]


def test_the_first_phase_is_the_presets_own_schedule():
    flags = training_flags(get_preset("kimi-k2"))
    preset = dict(itertools.pairwise(flags))
    for name in ("--lr", "--min-lr"):
        assert float(preset[name]) == float(_flag(PRETRAIN, name))
    for name in ("--train-samples", "--lr-warmup-samples", "--lr-wsd-decay-samples"):
        assert preset[name] == _flag(PRETRAIN, name)


def test_the_small_curve_has_the_shape_of_the_large():
    small = scaled_down(kimi_k2_phases(), steps=100, seq_length=64, sequences_per_step=32, lr=4e-3)
    assert [phase.seq_length for phase in small] == [64, 64, 512, 2048]
    assert {phase.tokens_per_step for phase in small} == {2048}
    assert [phase.steps for phase in small] == [100, 4, 4, 4]
    assert small[0].lr == 4e-3
    for phase, whole in zip(small, kimi_k2_phases(), strict=True):
        at_end = phase.lr_at(phase.tokens) / small[0].lr
        assert math.isclose(at_end, whole.lr_at(whole.tokens) / 2e-4, rel_tol=1e-9)
    assert small[0].warmup_tokens == 2048  # 500 of 230,968 steps would be a fifth of one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_length": 5000}, "not a multiple of the sequence length 5000"),
        ({"decay_tokens": 16 * 10**12}, "warm-up and decay take"),
    ],
)
def test_a_phase_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(PRETRAIN, **change)
