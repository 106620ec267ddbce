"""One attention on two ranks: context parallelism, tensor parallelism with and without sequence.

Tolerances: context parallelism in fp64, 1e-12. Tensor parallelism in fp32 sums each output in two
parts, a few 2⁻²⁴ of the tensor's largest magnitude: 2e-6. The upstream module's error, which is
what ``K2SelfAttention`` repairs, is in ``tests/host/test_upstream_mla_gradients.py``. Not
exercised: more than two ranks, both kinds at once (``tests/parallel/test_layouts.py``).
"""

import pytest
import torch

from tests.model.worker import BATCH, HEADS, SEQ, attention_inputs, results_of, seeded, zigzag
from tests.oracles.attention import einsum_attention, forbidden_causal

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CASES = ["context parallel", "K2 one rank", "K2 TP2", "K2 TP2+SP"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(CASES, tmp_path_factory.mktemp("two_ranks"))


def _einsum_on_one_rank():
    leaves = [t.requires_grad_() for t in attention_inputs()]
    bhsd = [t.permute(1, 2, 0, 3) for t in leaves]
    out, maxima = einsum_attention(*bhsd, 0.37, forbidden_causal(SEQ, SEQ))
    out = out.permute(2, 0, 1, 3).flatten(2)
    grads = torch.autograd.grad(out, leaves, seeded("direction", SEQ, BATCH, HEADS * 5).double())
    return {"out": out.detach()} | dict(zip("qkv", grads, strict=True)), maxima


def test_zigzag_context_parallelism_equals_one_rank(results):
    expected, maxima = _einsum_on_one_rank()
    for rank, found in enumerate(results["context parallel"]):
        for name, whole in expected.items():
            part = zigzag(whole, rank, 2)
            torch.testing.assert_close(found[name], part, rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(found["maxima"], maxima.float(), rtol=1e-6, atol=0)
    local = [found["local_maxima"] for found in results["context parallel"]]
    assert not torch.equal(*local), "the reduction over ranks would not be needed"


def test_contiguous_halves_in_place_of_zigzag_are_seen(results):
    expected, _ = _einsum_on_one_rank()
    found = results["context parallel"][0]["out"]
    assert (found - expected["out"].chunk(2)[0]).abs().max() > 1e-2


def _differences(found, expected):
    return {
        name: ((found[name] - whole).abs().max() / whole.abs().max()).item()
        for name, whole in expected.items()
    }


@pytest.mark.parametrize("layout", ["K2 TP2", "K2 TP2+SP"])
def test_latent_attention_over_two_tensor_parallel_ranks_equals_one(results, layout):
    expected = results["K2 one rank"][0]
    for found in results[layout]:
        differences = _differences(found, expected)
        assert len(differences) == 9
        assert max(differences.values()) < 2e-6, differences
