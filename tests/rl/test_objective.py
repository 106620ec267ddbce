"""The objective by three independent ways: finite differences in fp64, K=2 by hand, the papers'.

The slow derivation is a policy of independent categorical draws whose sequence probabilities are
products written out. Wrong variants: a deviation over the standard deviation, an importance ratio
in the report's form, a dead group in the denominator.
"""

import pytest
import torch

from megatron_k2.errors import UserError
from megatron_k2.rl.objective import (
    Advantages,
    advantages,
    sequence_log_ratios,
    sequence_loss,
    token_loss,
    window_loss,
)
from tests.support.devices import DEVICES, on_device

TAU = 0.3
LENGTHS = [3, 1, 2, 4, 2, 2]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0], dtype=torch.float64)
WIDTH = 5


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    with on_device(request.param):
        yield request.param


def _drawn(seed=0):
    """Logits [tokens, ids] of a policy, what it drew, and the old policy's log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    draw = {"generator": generator, "dtype": torch.float64}
    logits = torch.randn(count, WIDTH, **draw)
    old = torch.randn(count, WIDTH, **draw).log_softmax(-1)
    ids = torch.randint(WIDTH, (count, 1), generator=generator)
    sample = torch.tensor([i for i, length in enumerate(LENGTHS) for _ in range(length)])
    return logits, ids, old.gather(1, ids)[:, 0], sample


def _ratios(logits, ids, old):
    return logits.log_softmax(-1).gather(1, ids)[:, 0] - old


def _sequence(logits, rewards=REWARDS, tau=TAU, scale="sum", seed=0):
    _, ids, old, sample = _drawn(seed)
    mask = torch.ones(len(sample), dtype=torch.bool)
    sums = sequence_log_ratios(_ratios(logits, ids, old), mask, sample, len(rewards))
    found = advantages(rewards, GROUPS)
    return sequence_loss(sums, torch.tensor(LENGTHS), found, tau, scale)


def _by_the_report(logits, rewards=REWARDS, tau=TAU, scale="sum"):
    """``E_x 1/K sum (r - mean r - tau log(pi / pi_old))^2``, product by product, over 2 tau."""
    _, ids, old, sample = _drawn()
    probabilities = logits.softmax(-1).gather(1, ids)[:, 0] / old.exp()
    total = 0.0
    for prompt in (0, 1):
        for i in range(3 * prompt, 3 * prompt + 3):
            ratio = probabilities[sample == i].prod()
            mean = rewards[3 * prompt : 3 * prompt + 3].sum() / 3
            term = (rewards[i] - mean - tau * ratio.log()) ** 2 / 3 / 2
            total = total + (term / LENGTHS[i] if scale == "per_token" else term)
    return total / (2 * tau)


def _gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits), logits)[0]


@pytest.mark.parametrize("scale", ["sum", "per_token"])
def test_loss_and_gradient_are_the_reports_and_finite_differences(scale):
    logits = _drawn()[0]
    found = _sequence(logits, scale=scale)
    torch.testing.assert_close(found, _by_the_report(logits, scale=scale), rtol=1e-12, atol=0)
    slope = _gradient(lambda x: _sequence(x, scale=scale), logits)
    step = 1e-6
    for place in range(0, logits.numel(), 7):
        moved = torch.zeros_like(logits).view(-1)
        moved[place] = step
        moved = moved.view_as(logits)
        up, down = (_sequence(logits + s * moved, scale=scale) for s in (1, -1))
        assert abs((up - down) / (2 * step) - slope.view(-1)[place]) < 1e-8


def test_two_answers_by_hand():
    """Rewards 1 and 0, tau 0.5, log-ratios 0.2 and -0.4: (0.4^2 + (-0.3)^2) / 2 / (2 x 0.5)."""
    found = advantages(torch.tensor([1.0, 0.0]), torch.tensor([7, 7]))
    assert found.values.tolist() == [0.5, -0.5]
    assert found.weights.tolist() == [0.5, 0.5]
    sums = torch.tensor([0.2, -0.4], requires_grad=True)
    loss = sequence_loss(sums, torch.tensor([1, 1]), found, 0.5)
    assert loss.item() == pytest.approx((0.4**2 + 0.3**2) / 2)
    (slope,) = torch.autograd.grad(loss, sums)
    assert slope.tolist() == pytest.approx([-0.2, 0.15])  # -(A - tau l) / 2


def test_on_policy_gradient_is_reinforces_with_the_groups_mean():
    """Identity 1: at pi = pi_old it is ``-A grad log pi``, whatever tau; K1.5's equation 3."""
    logits, ids, _, sample = _drawn()
    old = logits.log_softmax(-1).gather(1, ids)[:, 0]
    found = advantages(REWARDS, GROUPS)
    mask = torch.ones(len(sample), dtype=torch.bool)

    def loss(x, tau):
        sums = sequence_log_ratios(_ratios(x, ids, old), mask, sample, 6)
        return sequence_loss(sums, torch.tensor(LENGTHS), found, tau)

    def reinforce(x):
        return -(found.weights[sample] * found.values[sample] * _ratios(x, ids, old)).sum()

    expected = _gradient(reinforce, logits)
    for tau in (0.01, 0.3, 5.0):
        found_slope = _gradient(lambda x, tau=tau: loss(x, tau), logits)
        torch.testing.assert_close(found_slope, expected, rtol=1e-12, atol=1e-15)


def test_gradient_is_k15s_equation_3_off_policy():
    """Identity 2: ``-(A grad log pi - tau/2 grad (log ratio)^2)``, sequence by sequence."""
    logits, ids, old, sample = _drawn()
    values = advantages(REWARDS, GROUPS).values

    def equation(x):
        ratios = _ratios(x, ids, old)
        sums = torch.stack([ratios[sample == i].sum() for i in range(6)])
        return -(values * sums - TAU / 2 * sums**2).sum() / 6

    torch.testing.assert_close(
        _gradient(_sequence, logits), _gradient(equation, logits), rtol=1e-12, atol=1e-15
    )


def test_token_form_is_the_sequence_form_at_length_one_and_not_beyond():
    """Identity 3."""
    logits, ids, old, sample = _drawn()
    found = advantages(REWARDS, GROUPS)
    first = torch.tensor([0, 3, 4, 6, 10, 12])
    for kept, is_same in ((first, True), (torch.arange(len(sample)), False)):
        mask = torch.zeros(len(sample), dtype=torch.bool)
        mask[kept] = True
        lengths = torch.bincount(sample[mask], minlength=6)

        def tokens(x, mask=mask, lengths=lengths):
            return token_loss(_ratios(x, ids, old), mask, sample, lengths, found, TAU, "sum")

        def sequences(x, mask=mask, lengths=lengths):
            sums = sequence_log_ratios(_ratios(x, ids, old), mask, sample, 6)
            return sequence_loss(sums, lengths, found, TAU)

        pair = _gradient(tokens, logits), _gradient(sequences, logits)
        assert torch.allclose(*pair, rtol=1e-12, atol=1e-15) is is_same


def test_on_policy_without_advantage_the_gradient_is_exactly_zero():
    rewards = torch.full((6,), 0.1, dtype=torch.float64)
    assert not _gradient(lambda x: _sequence(x, rewards), _drawn()[0]).any()
    assert advantages(rewards, GROUPS).num_live_groups == 0


def test_a_dead_group_changes_neither_gradients_nor_their_scale():
    """slime #657, TRL #6367 and #5588: not its own, although the policy moved, nor the other's."""
    logits, ids, old, sample = _drawn()
    half = REWARDS.clone()
    half[3:] = 1.0
    slope = _gradient(lambda x: _sequence(x, half), logits)
    assert not slope[sample >= 3].any()
    alone = advantages(REWARDS[:3], GROUPS[:3])
    mask = sample < 3

    def loss(x, alone=alone):
        sums = sequence_log_ratios(_ratios(x, ids, old), mask, sample, 3)
        return sequence_loss(sums, torch.tensor(LENGTHS[:3]), alone, TAU)

    assert torch.equal(slope, _gradient(loss, logits))
    # Counted as any other, it pulls its answers back and halves the weight of the first group.
    counted = Advantages(advantages(half, GROUPS).values, torch.full((6,), 1 / 6).double(), 2)
    everything = torch.ones(len(sample), dtype=torch.bool)

    def wrong(x):
        sums = sequence_log_ratios(_ratios(x, ids, old), everything, sample, 6)
        return sequence_loss(sums, torch.tensor(LENGTHS), counted, TAU)

    off = _gradient(wrong, logits)
    assert off[sample >= 3].abs().max() > 1e-3
    torch.testing.assert_close(off[sample < 3], slope[sample < 3] / 2)


def test_groups_may_be_uneven_and_in_any_order():
    rewards = torch.tensor([1.0, 0.0, 0.0, 4.0, 1.0])
    found = advantages(rewards, torch.tensor([9, 2, 9, 2, 2]))
    assert found.values.tolist() == pytest.approx([0.5, -5 / 3, -0.5, 7 / 3, -2 / 3])
    assert found.weights.tolist() == pytest.approx([1 / 4, 1 / 6, 1 / 4, 1 / 6, 1 / 6])
    with_std = (rewards - rewards.mean()) / rewards.std()
    assert not torch.allclose(found.values, with_std)


def test_tokens_outside_the_mask_may_be_anything():
    """Bridge #3117: NaN times 0."""
    ratios = torch.tensor([0.5, torch.nan, -0.25, torch.inf], requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    sample = torch.tensor([0, 99, 1, -1])
    found = advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    sums = sequence_log_ratios(ratios, mask, sample, 2)
    assert sums.tolist() == [0.5, -0.25]
    lengths = torch.tensor([1, 1])
    losses = [
        sequence_loss(sums, lengths, found, TAU),
        token_loss(ratios, mask, sample, lengths, found, TAU, behaviour=ratios.detach()),
        window_loss(ratios, mask, sample, found, TAU, (-1.0, 1.0), 2),
    ]
    for loss in losses:
        (slope,) = torch.autograd.grad(loss, ratios, retain_graph=True)
        assert slope.isfinite().all()
        assert slope[[1, 3]].tolist() == [0, 0]


def test_a_trajectory_of_three_versions_by_hand():
    """slime #1445. Segments of versions 1, 2, 3 of two tokens each; pi_old is version 3.

    Sequence form: the last segment alone. Token form: all, each at exp(old - behaviour), at most 2.
    """
    found = advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    ratio = torch.tensor([0.1, 0.2, 0.3, -0.1, 0.2, 0.4, 0.0], requires_grad=True)
    sample = torch.tensor([0, 0, 0, 0, 0, 0, 1])
    version = torch.tensor([1, 1, 2, 2, 3, 3, 3])
    sums = sequence_log_ratios(ratio, version == 3, sample, 2)
    assert sums.tolist() == pytest.approx([0.6, 0.0])
    loss = sequence_loss(sums, torch.tensor([2, 1]), found, 0.5)
    (slope,) = torch.autograd.grad(loss, ratio)
    # -(A - tau l) / K = -(0.5 - 0.3) / 2 in the first answer, 0.5 / 2 in the second
    assert slope.tolist() == pytest.approx([0, 0, 0, 0, -0.1, -0.1, 0.25])
    behaviour = torch.tensor([1.0, 0.5, 0.0, -0.5, 0.0, 0.0, 0.0])
    everything = torch.ones(7, dtype=torch.bool)
    loss = token_loss(ratio, everything, sample, torch.tensor([6, 1]), found, 0.5, "sum", behaviour)
    (slope,) = torch.autograd.grad(loss, ratio)
    importance = behaviour.exp().clamp(max=2)
    assert importance[0] == 2
    own = torch.tensor([-0.5] * 6 + [0.5]) + 0.5 * ratio.detach()
    torch.testing.assert_close(slope, importance * own / 2)


def test_window_masks_the_first_term_alone_and_on_both_sides():
    """K2.5 equation 1 in fp64: inside, ``-rho A + 2 tau log rho``; outside, the second alone."""
    found = advantages(torch.tensor([1.0, 0.0]).double(), torch.tensor([0, 0]))
    values = torch.tensor([-0.6, -0.2, 0.1, 0.7, -0.6, 0.1, 0.7]).double()
    ratio = values.clone().requires_grad_()
    sample = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    mask = torch.ones(7, dtype=torch.bool)
    loss = window_loss(ratio, mask, sample, found, TAU, (-0.5, 0.5), 7)
    (slope,) = torch.autograd.grad(loss, ratio)
    inside = values.abs() < 0.5
    own = torch.where(inside, -values.exp() * found.values[sample], 0.0)
    torch.testing.assert_close(slope, (own + 2 * TAU * values) / 7)


def test_micro_batches_add_up_to_the_global_batch():
    logits, ids, old, sample = _drawn()
    found = advantages(REWARDS, GROUPS)
    whole = _gradient(_sequence, logits)
    added = torch.zeros_like(whole)
    for part in ([0, 4], [1, 2, 3], [5]):
        mask = torch.isin(sample, torch.tensor(part))

        def loss(x, mask=mask, part=part):
            sums = sequence_log_ratios(_ratios(x, ids, old), mask, sample, 6)[part]
            share = type(found)(found.values[part], found.weights[part], found.num_live_groups)
            return sequence_loss(sums, torch.tensor(LENGTHS)[part], share, TAU)

        added += _gradient(loss, logits)
    torch.testing.assert_close(added, whole, rtol=1e-12, atol=1e-15)


def test_share_of_the_pretraining_term_does_not_depend_on_tau():
    """On policy, RL's gradient is the same at any tau, so lambda x NLL beside it is the same part.

    The wrong variant is the report's form undivided: its gradient is proportional to tau.
    """
    logits, ids, _, sample = _drawn()
    old = logits.log_softmax(-1).gather(1, ids)[:, 0]
    found = advantages(REWARDS, GROUPS)
    mask = torch.ones(len(sample), dtype=torch.bool)

    def norm(tau, times):
        def loss(x):
            sums = sequence_log_ratios(_ratios(x, ids, old), mask, sample, 6)
            return times * sequence_loss(sums, torch.tensor(LENGTHS), found, tau)

        return _gradient(loss, logits).norm().item()

    assert norm(0.01, 1) == pytest.approx(norm(1.0, 1), rel=1e-12)
    assert norm(0.01, 2 * 0.01) == pytest.approx(norm(1.0, 2) / 100, rel=1e-12)


def test_wrong_input_is_named():
    with pytest.raises(UserError, match="answer 1 is nan"):
        advantages(torch.tensor([1.0, torch.nan]), torch.tensor([0, 0]))
    with pytest.raises(UserError, match="expected one of each"):
        advantages(torch.ones(2), torch.ones(3))
    found = advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    with pytest.raises(UserError, match="tau 0"):
        sequence_loss(torch.zeros(2), torch.ones(2), found, 0.0)
    nothing = torch.zeros(0)
    with pytest.raises(UserError, match="both sides of 0"):
        window_loss(nothing, nothing.bool(), nothing.long(), found, TAU, (0.1, 0.5), 1)
