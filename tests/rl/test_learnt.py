"""An iteration's records as metrics, by hand."""

import math

import pytest

from megatron_k2.rl.learnt import Learnt, Measured, Mismatch, Update, metrics
from megatron_k2.run.metrics import StepRecord


def _measured(kl, nll=None, clipped=0, rms=None):
    step = StepRecord(
        *(1, 8, 100, 1.0, 1e-3, 5.0 * kl, False, 0.1, 10.0, (3.0,), clipped, 0, 1.0, (1.5,)),
        update_rms=rms,
    )
    return Measured(1.0, 1.0 + kl, nll, None, 2.0, 0.0, kl, step)


def _update(number, measured):
    return Update(number, number, measured is not None, 4, 3, 12, 50, 80, 20, measured)


def test_means_and_largest_are_of_the_mini_batches_that_ran():
    learnt = Learnt(
        Mismatch(100, 1e-3, 0.5, 0.0, 1e-6),
        (
            _update(1, _measured(0.1, 4.0, 2, {"dense": 0.2, "adamw": 0.9})),
            _update(2, None),
            _update(3, _measured(0.3, 2.0, 1, {"dense": 0.3, "adamw": 0.4})),
        ),
        0.0,
        0.0,
    )
    found = metrics(learnt)
    expected = {
        "learn/steps": 2,
        "learn/live_groups": 9,
        "learn/tokens": 240,
        "learn/saved_tokens": 60,
        "learn/clipped_heads": 3,
        "learn/mismatch": 1e-3,
        "learn/mismatch_largest": 0.5,
        "learn/mismatch_kl": 1e-6,
        "learn/loss": 1.0,
        "learn/objective": 1.2,
        "learn/ptx_nll": 3.0,
        "learn/entropy": 2.0,
        "learn/log_ratio": 0.0,
        "learn/kl": 0.3,
        "learn/grad_norm": 1.5,
        "learn/max_logit": 3.0,
        "learn/update_rms": 9e-4,
    }
    assert found == pytest.approx(expected)


def test_of_an_iteration_without_a_step_little_is_known():
    nan = math.nan
    found = metrics(Learnt(Mismatch(0, nan, nan, nan, nan), (_update(1, None),), 0.0, 0.0))
    assert set(found) == {
        *(
            "learn/steps",
            "learn/live_groups",
            "learn/tokens",
            "learn/saved_tokens",
            "learn/clipped_heads",
        ),
    }
