"""RMSNorm against its formula, fp64 where the bound is tight.

Not exercised: the sum over sequence-parallel ranks itself (``test_layer_on_two_ranks.py``).
"""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_k2.model.norm import RMSNorm
from tests.support.devices import DEVICES, here, on_device

WIDTH = 24


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _device(request):
    with on_device(request.param):
        yield


def _norm(dtype=torch.float64, eps=1e-6, **config):
    shared = {"num_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 2}
    norm = RMSNorm(
        TransformerConfig(**shared, params_dtype=dtype, use_cpu_initialization=True, **config),
        WIDTH,
        eps=eps,
    ).to(here())
    generator = torch.Generator().manual_seed(1)
    norm.weight.data += 0.3 * torch.randn(WIDTH, generator=generator).to(dtype)
    return norm


def _formula(x, weight, eps):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _mean_subtracted(x, weight, eps):
    """Deliberately wrong: LayerNorm without bias."""
    return _formula(x - x.mean(-1, keepdim=True), weight, eps)


def _outputs_and_gradients(formula, eps):
    norm = _norm(eps=eps)
    x = torch.randn(3, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    results = []
    for out in (norm(x), formula(x, norm.weight, eps)):
        grads = torch.autograd.grad(out.pow(3).sum(), (x, norm.weight))
        results.append([out, *grads])
    return [(found - expected).abs().max().item() for found, expected in zip(*results, strict=True)]


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_output_and_gradients_equal_the_formula(eps):
    assert max(_outputs_and_gradients(_formula, eps)) < 1e-12


def test_a_subtracted_mean_is_seen():
    assert min(_outputs_and_gradients(_mean_subtracted, 1e-6)) > 1e-2


def test_statistics_of_bf16_inputs_are_fp32():
    """One rounding of the result; statistics in bf16 would be off by many."""
    norm = _norm(torch.bfloat16)
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = _formula(x.double(), norm.weight.double(), 1e-6)
    found = norm(x)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() / exact.abs().clamp(min=1e-3)).max() < 2**-7


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_is_marked_for_the_sum_over_sequence_parallel_ranks(sequence_parallel):
    size = 2 if sequence_parallel else 1
    norm = _norm(sequence_parallel=sequence_parallel, tensor_model_parallel_size=size)
    assert norm.weight.sequence_parallel is sequence_parallel
