"""The grouped experts against each expert's own products, one after another, in fp64.

fp32 tolerance 2e-6 relative to the largest entry: sums of at most 48 products of order one. Not
exercised: expert parallelism and ZeRO's overlapped gather (``tests/parallel/test_layouts.py``).
"""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_k2.model.experts import GroupedExperts, weighted_swiglu
from tests.support.devices import DEVICES
from tests.support.single_rank import SMALL, build, one_rank, randomise

SIZES = [5, 0, 3, 1, 0, 7, 2, 6]
"""Tokens of each expert; two have none."""


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


@pytest.fixture(scope="module")
def experts(_rank):
    model = build(SMALL).train()
    randomise(model)
    return next(m for m in model.modules() if isinstance(m, SequentialMLP))


def _inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(sum(SIZES), SMALL.hidden_size, generator=generator).to(dtype)
    probs = torch.rand(sum(SIZES), generator=generator)
    grad = torch.randn(sum(SIZES), SMALL.hidden_size, generator=generator).to(dtype)
    return hidden.requires_grad_(), probs.requires_grad_(), grad


def _weights(experts, dtype):
    return [
        [p.detach().to(dtype).requires_grad_() for p in expert.parameters()]
        for expert in experts.local_experts
    ]


def one_by_one(weights, hidden, probs, is_weighted=True):
    """The oracle: a loop over experts, SwiGLU written out."""
    outputs, start = [], 0
    for (fused, down), size in zip(weights, SIZES, strict=True):
        rows = hidden[start : start + size]
        gate, up = (rows @ fused.T).chunk(2, dim=-1)
        activated = gate * torch.sigmoid(gate) * up
        if is_weighted:
            activated = activated * probs[start : start + size, None]
        outputs.append(activated @ down.T)
        start += size
    return torch.cat(outputs)


def _oracle(experts, is_weighted=True):
    hidden, probs, grad = _inputs()
    hidden, probs = (t.detach().double().requires_grad_() for t in (hidden, probs))
    weights = _weights(experts, torch.float64)
    out = one_by_one(weights, hidden, probs, is_weighted)
    out.backward(grad.double())
    return [out, hidden.grad, probs.grad, *(p.grad for pair in weights for p in pair)]


def _grouped(experts):
    hidden, probs, grad = _inputs()
    for param in experts.parameters():
        param.grad = None
    out, bias = experts(hidden, torch.tensor(SIZES), probs)
    assert bias is None
    out.backward(grad)
    return [out, hidden.grad, probs.grad, *(p.grad for p in experts.parameters())]


def _difference(found, expected):
    """Largest over the tensors of |difference| relative to the largest entry."""
    return max(
        ((a.double() - (torch.zeros_like(a) if b is None else b)).abs().max() / scale).item()
        for a, b in zip(found, expected, strict=True)
        if (scale := 1.0 if b is None else max(b.abs().max().item(), 1e-3))
    )


def test_output_and_every_gradient_equal_a_loop_over_experts(experts):
    assert isinstance(experts, GroupedExperts)
    assert _difference(_grouped(experts), _oracle(experts)) < 2e-6


def test_experts_without_routing_weights_or_in_another_order_are_seen(experts):
    found = _grouped(experts)
    unweighted = _oracle(experts, is_weighted=False)
    assert _difference(found[:2], unweighted[:2]) > 0.1
    expected = _oracle(experts)
    # two parameters an expert behind output, hidden and probs: expert i against i + 1
    assert _difference(found[3:-2], expected[5:]) > 0.1


def test_an_expert_without_tokens_gets_a_gradient_of_zero(experts):
    _grouped(experts)
    idle = [expert for expert, size in zip(experts.local_experts, SIZES, strict=True) if not size]
    assert [p.grad.count_nonzero().item() for expert in idle for p in expert.parameters()] == [
        0
    ] * 4


def test_the_activation_passes_gradcheck_and_keeps_its_inputs_only():
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weighted_swiglu, (gate_up, probs))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        weighted_swiglu(gate_up, probs)
    assert sorted(kept) == [(4, 1), (4, 6)]


def test_a_bf16_activation_is_weighted_in_fp32_and_rounded_once_after():
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    probs = torch.rand(64, generator=generator).requires_grad_()
    grad = torch.randn(64, 16, generator=generator).bfloat16()
    out = weighted_swiglu(gate_up, probs)
    gate, up = gate_up.detach().chunk(2, dim=-1)
    product = (F.silu(gate) * up).float() * probs.detach()[:, None]
    assert torch.equal(out, product.bfloat16())
    rounded_weight = (F.silu(gate) * up) * probs.detach()[:, None].bfloat16()
    assert not torch.equal(out, rounded_weight)
    exact = [t.detach().double().requires_grad_() for t in (gate_up, probs)]
    expected = torch.autograd.grad(weighted_swiglu(*exact), exact, grad.double())
    for a, b in zip(torch.autograd.grad(out, (gate_up, probs), grad), expected, strict=True):
        assert (a - b).abs().max() < 2e-2 * b.abs().max()  # bf16 products, 3 in a row


def test_waiting_hooks_of_every_expert_run_before_its_weight_is_read(experts):
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda m, _: seen.append(m))
        for module in experts.modules()
        if list(module.parameters(recurse=False))
    ]
    experts(*(_inputs()[0], torch.tensor(SIZES), _inputs()[1]))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(set(seen)) == 2 * SMALL.num_moe_experts


def test_checkpoint_keys_are_those_of_upstreams_sequential_experts(experts):
    shards = experts.sharded_state_dict("mlp.").values()
    keys = {shard.key for shard in shards if not shard.key.endswith("_extra_state")}
    assert keys == {"mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight"}


@pytest.mark.parametrize(
    "flags", [("--activation-func-clamp-value", "7"), ("--glu-linear-offset", "1")]
)
def test_an_activation_that_is_not_k2s_is_refused(flags):
    """By us, or with the flags of a GPU by Megatron, before us."""
    with pytest.raises(ValueError, match=r"without bias, clamp|bias_activation_fusion"):
        build(SMALL, *flags)


def test_rows_that_the_grouped_product_cannot_take_are_refused_with_the_multiple():
    with pytest.raises(ValueError, match=r"ffn_hidden_size=20 in torch.bfloat16: .* multiple of 8"):
        build(SMALL, "--bf16")
