"""Replayed choices through Megatron's own routing function, and through passes computed again.

Wrong variants: weights on record in place of choices, whose router has no gradient; choices of the
micro-batch that came last where an earlier one is computed again.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch.utils.checkpoint import checkpoint

from megatron_k2.errors import UserError
from megatron_k2.rl.learner import Learner
from megatron_k2.rl.replay import RecordedRoutes
from tests.support.devices import DEVICES, on_device

TOKENS, HIDDEN, EXPERTS, TOP_K = 7, 6, 8, 3


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    with on_device(request.param):
        yield request.param


def _drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    order = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)
    return hidden, order[:, :TOP_K]


def _weight():
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(9))


def _routed(hidden, weight, replay):
    """K2's routing: probabilities [tokens, experts] and the map of them."""
    bias = torch.linspace(-1, 1, EXPERTS).to(weight.device)
    return topk_routing_with_score_function(
        hidden @ weight.T,
        TOP_K,
        scaling_factor=2.827,
        score_function="sigmoid",
        expert_bias=bias,
        router_replay=replay,
    )


def test_replayed_experts_keep_their_scores_and_the_router_its_gradient():
    """ISEEKYAN/Megatron-LM #79: weights on record have no gradient."""
    hidden, routes = _drawn(0)
    weight = _weight().requires_grad_()
    replay = RecordedRoutes()
    replay.begin(routes, is_training=True)
    probabilities, chosen = _routed(hidden, weight, replay)
    own, own_chosen = _routed(hidden, weight, None)
    assert not chosen.equal(own_chosen)
    assert chosen.nonzero()[:, 1].view(TOKENS, TOP_K).equal(routes.sort(1).values)
    assert (probabilities[chosen] > 0).all()
    torch.testing.assert_close(probabilities.sum(1), own.sum(1))
    scores = (hidden @ weight.T).sigmoid()
    by_hand = torch.where(chosen, scores, 0.0)
    by_hand = 2.827 * by_hand / by_hand.sum(1, keepdim=True)
    torch.testing.assert_close(probabilities, by_hand)
    mix = torch.arange(EXPERTS).float().to(weight.device)
    slopes = [
        torch.autograd.grad((found * mix).square().sum(), weight, retain_graph=True)[0]
        for found in (probabilities, by_hand)
    ]
    torch.testing.assert_close(*slopes)
    assert (slopes[0].abs().amax(1) > 0).equal(chosen.any(0))
    on_record = probabilities.detach()
    assert not (on_record * mix).square().sum().requires_grad


def test_rows_without_a_record_are_routed_as_ever():
    hidden, routes = _drawn(1)
    routes[2:5] = -1
    replay = RecordedRoutes()
    replay.begin(routes, is_training=False)
    _, chosen = _routed(hidden, _weight(), replay)
    _, own = _routed(hidden, _weight(), None)
    assert chosen[2:5].equal(own[2:5])
    assert not chosen[:2].equal(own[:2])
    replay.begin(None, is_training=False)
    assert _routed(hidden, _weight(), replay)[1].equal(own)


class _Latest(RecordedRoutes):
    """Knows the micro-batch at hand alone."""

    def _of_this_pass(self):
        return self._routes


def _gradient(kind, is_again):
    """Of two micro-batches whose backward passes begin when both forward passes are done."""
    weight, replay, losses = _weight().requires_grad_(), kind(), []
    for seed in (3, 4):
        hidden, routes = _drawn(seed)
        replay.begin(routes, is_training=True)
        forward = partial(_routed, hidden, replay=replay)
        if is_again:
            probabilities, _ = checkpoint(forward, weight, use_reentrant=True)
        else:
            probabilities, _ = forward(weight)
        losses.append((probabilities * hidden.sum()).square().sum())
    for loss in losses:
        loss.backward()
    return weight.grad


def test_a_layer_that_is_computed_again_takes_its_own_micro_batchs_routes():
    expected = _gradient(RecordedRoutes, is_again=False)
    assert _gradient(RecordedRoutes, is_again=True).equal(expected)
    assert not torch.allclose(_gradient(_Latest, is_again=True), expected)


def test_routes_of_another_model_are_refused():
    hidden, routes = _drawn(1)
    replay = RecordedRoutes()
    replay.begin(routes[:, :2], is_training=False)
    with pytest.raises(UserError, match=r"\[7, 2\]"):
        _routed(hidden, _weight(), replay)


def test_packs_without_recorded_routes_are_told_of_once(capsys):
    def learner(num_layers):
        found = Learner.__new__(Learner)
        found._replay = SimpleNamespace(num_layers=num_layers)
        found._told_unrecorded = False
        found._args, found._hooks = SimpleNamespace(rank=3), SimpleNamespace(terminal=None)
        return found

    none = SimpleNamespace(routes=None, lengths=[4])
    some = SimpleNamespace(routes=[[[0]]], lengths=[4])
    curated = SimpleNamespace(routes=None, lengths=[])
    with_experts, dense = learner(2), learner(0)
    for packs in ([some, curated], [none, some], [none]):
        with_experts._tell_unrecorded(packs)
        dense._tell_unrecorded(packs)
    told = capsys.readouterr().out
    assert told.count("rank 3: 1 of 2 packs have no routes") == 1 == told.count("\n")
