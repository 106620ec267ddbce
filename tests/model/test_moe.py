"""Routing and balance against loops over tokens and experts.

Routing weights are one sigmoid and one division in fp32, 1e-6. Bias updates add one number of 1e-3
to one of at most 1: 1e-7. Not exercised: expert parallelism (``tests/parallel/test_layouts.py``),
the experts' own arithmetic (``test_hf_parity.py``).
"""

from dataclasses import replace

import pytest
import torch

from megatron_k2.model.moe import BalancedFinalize, remove_common_drift, routers
from tests.oracles.router import next_bias, route_token, route_token_with_biased_weights
from tests.support.devices import DEVICES
from tests.support.single_rank import SMALL, build, one_rank, randomise

EXPERTS, TOPK, SCALE = (
    SMALL.num_moe_experts,
    SMALL.moe_router_topk,
    SMALL.moe_router_topk_scaling_factor,
)


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


@pytest.fixture(scope="module")
def model(_rank):
    model = build(SMALL).train()
    randomise(model)
    return model


def _moe(model):
    return next(layer.mlp for layer in model.decoder.layers if hasattr(layer.mlp, "router"))


def _hidden(seed=0, tokens=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 1, SMALL.hidden_size, generator=generator)


def _table(hidden, router, route):
    logits = hidden.flatten(0, 1).double() @ router.weight.detach().double().T
    table = torch.zeros(len(logits), EXPERTS)
    for token, row in enumerate(logits.tolist()):
        for expert, weight in route(row, router.expert_bias.tolist(), TOPK, SCALE).items():
            table[token, expert] = weight
    return table


@pytest.fixture
def router(model):
    """A router whose bias is large enough to change the selection of most tokens."""
    router = _moe(model).router
    before = router.expert_bias.clone()
    router.expert_bias.copy_(torch.linspace(-0.6, 0.6, EXPERTS))
    yield router
    router.expert_bias.copy_(before)


def test_routing_equals_a_loop_over_tokens(router):
    hidden = _hidden()
    probs, routing_map = router(hidden)
    expected = _table(hidden, router, route_token)
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(routing_map, expected > 0)
    assert (routing_map.sum(1) == TOPK).all()
    torch.testing.assert_close(probs.sum(1), torch.full((24,), SCALE), rtol=1e-6, atol=0)


def test_a_bias_that_enters_the_weights_or_no_bias_at_all_is_seen(router):
    hidden = _hidden()
    probs, routing_map = router(hidden)
    biased = _table(hidden, router, route_token_with_biased_weights)
    assert (probs - biased).abs().max() > 1e-2
    unbiased = _table(hidden, router, lambda x, b, k, s: route_token(x, [0.0] * len(b), k, s))
    assert (routing_map != (unbiased > 0)).any(1).float().mean() > 0.5


def test_bf16_activations_are_routed_by_fp32_logits():
    router = _moe(build(replace(SMALL, moe_ffn_hidden_size=24), "--bf16")).router
    assert router.weight.dtype == torch.bfloat16
    hidden = _hidden().bfloat16()
    logits = router.gating(hidden)
    assert logits.dtype == torch.float32
    exact = hidden.double() @ router.weight.double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-6)
    rounded = (hidden @ router.weight.T).double()
    assert (rounded - exact).abs().max() > 100 * (logits.double() - exact).abs().max()


def test_permuted_tokens_give_permuted_outputs(model):
    """Each token's experts see other neighbours in their batch: 1e-6 of the largest output."""
    moe, hidden = _moe(model), _hidden()
    permutation = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    out, permuted = moe(hidden)[0], moe(hidden[permutation])[0]
    bound = 1e-6 * out.abs().max()
    assert (permuted - out[permutation]).abs().max() <= bound
    assert (permuted - out).abs().max() > 1e3 * bound


def _wrapped(rule):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    model = build(SMALL).train()
    randomise(model)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    return ddp, BalancedFinalize(finalize_model_grads, rule)


def _count_routes(ddp):
    """Live per-router token counts, taken from the routing maps themselves."""
    counts = [torch.zeros(EXPERTS) for _ in routers([ddp])]

    def add_to(count):
        def hook(_router, _args, out):
            count.add_(out[1].sum(0))

        return hook

    for router, count in zip(routers([ddp]), counts, strict=True):
        router.register_forward_hook(add_to(count))
    return counts


@pytest.mark.parametrize("rule", ["sign", "mean-sign"])
def test_biases_and_loads_follow_the_rule_over_several_steps(rule):
    ddp, finalize = _wrapped(rule)
    here = list(routers([ddp]))
    assert len(here) == SMALL.num_moe_layers
    counts = _count_routes(ddp)
    expected = [router.expert_bias.tolist() for router in here]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for _micro_batch in range(2):
            tokens = torch.randint(SMALL.vocab_size, (1, 24), generator=generator)
            ddp(tokens, torch.arange(24)[None], None)
        finalize([ddp])
        expected = [
            next_bias(torch.tensor(bias, dtype=torch.float64), count, 1e-3, rule)
            for bias, count in zip(expected, counts, strict=True)
        ]
        for router, bias, count, load in zip(here, expected, counts, finalize.loads, strict=True):
            torch.testing.assert_close(router.expert_bias, torch.tensor(bias), rtol=0, atol=1e-7)
            assert torch.equal(load, count)
            assert load.sum() == 2 * 24 * TOPK
            assert not router.local_tokens_per_expert.any()
            count.zero_()


def test_an_evaluation_forward_counts_no_tokens():
    ddp, _ = _wrapped("sign")
    ddp.eval()
    with torch.no_grad():
        ddp(torch.zeros(1, 24, dtype=torch.long), torch.arange(24)[None], None)
    assert not any(router.local_tokens_per_expert.any() for router in routers([ddp]))


def test_mean_sign_keeps_the_mean_bias_and_sign_does_not():
    """One overloaded expert among eight: plain signs lift seven and lower one."""
    before = torch.zeros(EXPERTS)
    after = torch.full((EXPERTS,), 1e-3)
    after[0] = -1e-3
    assert after.mean() > 7e-4
    balanced = remove_common_drift(before, after)
    assert balanced.mean().abs() < 1e-10
    load = torch.ones(EXPERTS)
    load[0] = 9
    expected = torch.tensor(next_bias(before, load, 1e-3, "mean-sign"))
    torch.testing.assert_close(balanced, expected, rtol=0, atol=1e-9)


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(ValueError, match="'median'"):
        BalancedFinalize(lambda *_: None, "median")


def test_a_model_without_experts_has_no_loads():
    finalize = BalancedFinalize(lambda *_args: None)
    finalize([torch.nn.Linear(2, 2)])
    assert finalize.loads == []
