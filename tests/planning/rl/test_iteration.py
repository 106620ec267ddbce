"""An iteration's parts, tokens and GPU-hours by hand; the picture adds up to the simulation."""

import math

import pytest

from megatron_k2.planning.estimate import Assumptions, estimate
from megatron_k2.planning.rl.figure import binned, draw_iteration
from megatron_k2.planning.rl.iteration import (
    PACK_FILL,
    RUBRIC_TOKENS,
    forward_seconds,
    packs_per_step,
    plan_iteration,
    reserved_gb,
    starts,
    tokens_of_judges,
)
from megatron_k2.planning.rl.memory import held
from megatron_k2.planning.update import weight_update
from megatron_k2.presets import KIMI_K2
from tests.planning.rl.asked import LENGTHS, request

A = Assumptions()


@pytest.fixture(scope="module")
def plan():
    return plan_iteration(request(judged=0.5), A)


def test_parts_follow_one_another_and_add_up(plan):
    parts = {part.name: part.seconds for part in plan.parts}
    r = plan.request
    host = r.trainer.gpu.pcie_gb_per_s * 1e9 * A.part("host")
    train = held(r).train
    assert parts["states to host"] == pytest.approx(train.optimizer / host)
    assert parts["back to GPU"] == pytest.approx((train.optimizer + train.weights) / host)
    update = weight_update(KIMI_K2, r.trainer.gpu, 256, A, is_fp8=True)
    assert parts["update"] == pytest.approx(update.seconds)
    assert parts["train"] == pytest.approx(4 * plan.step.step_seconds)
    assert parts["pi_old"] == pytest.approx(4 * forward_seconds(plan.step, A))
    assert 0.2 < parts["pi_old"] / parts["train"] < 0.5, "forward alone, of forward and twice that"
    assert plan.seconds == pytest.approx(sum(parts.values()))
    assert plan.gpu_hours == pytest.approx(plan.seconds * 256 / 3600)
    assert starts(plan.parts)[-1] + parts["train"] == pytest.approx(plan.seconds)


def test_a_step_trains_on_the_packs_that_answers_fill(plan):
    tokens = 1024 * (1024 + LENGTHS.mean)
    assert plan.request.tokens == pytest.approx(tokens)
    packs = math.ceil(tokens / 4 / (32768 * PACK_FILL))
    assert packs_per_step(plan.request) == packs == plan.step.request.sequences_per_step
    whole = estimate(plan.request.trainer, A)
    assert plan.step.step_seconds < whole.step_seconds, "a pack for each answer is the most"


def test_judges_read_every_pair_in_both_orders(plan):
    each = 1024 + 2 * LENGTHS.mean + RUBRIC_TOKENS
    assert tokens_of_judges(plan.request) == pytest.approx(0.5 * 128 * 56 * each)
    assert plan.judge_seconds > 0


def test_partial_rollouts_save_seconds_at_the_same_tokens(plan):
    partial, waited = (
        sum(r.trained_tokens for r in rollouts) for rollouts in (plan.rollouts, plan.waited)
    )
    assert partial == pytest.approx(waited, rel=0.1)
    assert plan.seconds < 0.8 * plan.waited_seconds
    assert plan.rollouts[-1].cut_off > 0 == plan.waited[-1].cut_off


def test_engines_of_their_own_move_nothing_and_cost_their_gpus(plan):
    engines = plan.request.engines.replace(is_colocated=False)
    apart = plan_iteration(request(engines=engines), A)
    parts = {part.name: part.seconds for part in apart.parts}
    assert parts["states to host"] == parts["back to GPU"] == parts["weights to host"] == 0
    assert apart.gpu_hours > 1.8 * plan.gpu_hours
    assert reserved_gb(apart.request) == reserved_gb(plan.request) - 3.0


def test_the_picture_shows_as_many_answers_as_were_decoded(plan):
    for rollout in (plan.rollouts[-1], plan.waited[-1]):
        new, resumed = binned(rollout, 200)
        area = sum(new + resumed) * rollout.seconds / 200
        decoded = sum(
            s.answers * (min(s.end, rollout.seconds) - s.start) for s in rollout.stretches
        )
        assert area == pytest.approx(decoded)
        assert (sum(resumed) > 0) == (rollout is plan.rollouts[-1])
    assert draw_iteration(plan).startswith(b"\x89PNG")
