"""Adapters around Transformer Engine's attention against the local modules': loss, every gradient.

Linears and experts are the same code on both sides; norms and attention are TE's, for which
stand-ins compute. Bound as in ``test_parity.py``.
"""

import pytest
import torch

from megatron_k2.model.lora.adapter import LowRankAdapter
from tests.support.single_rank import SMALL, build, one_rank, randomise
from tests.te.models import LOCAL_FLAGS, TE_FLAGS, batch, token_losses

LORA = "--lora-rank 4 --moe-router-load-balancing-type none".split()
RECOMPUTED = "--recompute-granularity selective --recompute-modules layernorm moe_act mla_up_proj"


@pytest.fixture(scope="module", autouse=True)
def _rank(_transformer_engine):
    with one_rank():
        yield


def gradients(model):
    loss = token_losses(model, *batch(SMALL)).mean()
    loss.backward()
    found = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    return loss.detach(), found


def pair(*te_flags):
    """(local, TE) with equal weights and adapters away from zero."""
    local = build(SMALL, *LOCAL_FLAGS, *LORA).train()
    randomise(local)
    for name, param in local.named_parameters():  # a tenth of the weights, as a trained one's
        param.data.mul_(0.1 if name.endswith("lora_b") else 1.0)
    te = build(SMALL, *TE_FLAGS, *LORA, *te_flags).train()
    state = {name: t for name, t in local.state_dict().items() if torch.is_tensor(t)}
    missing = te.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if not name.endswith("_extra_state")]
    return local, te


@pytest.mark.parametrize("recomputed", [(), RECOMPUTED.split()], ids=["", "recomputed"])
def test_loss_and_every_factors_gradient_equal_the_local_modules(host, recomputed):
    from tests.te.standin.extension import CALLS

    local, te = pair(*recomputed)
    CALLS.clear()
    loss, found = gradients(te)
    if host == "stand-in":
        assert "rmsnorm_fwd" in CALLS
    expected_loss, expected = gradients(local)
    assert found.keys() == expected.keys()
    assert ((loss - expected_loss) / expected_loss).abs() < 1e-6
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def test_an_adapter_that_is_off_is_seen(host):
    local, te = pair()
    adapters = [module for module in te.modules() if isinstance(module, LowRankAdapter)]
    adapters[0].lora_b.data.mul_(1.01)
    assert not torch.allclose(gradients(te)[0], gradients(local)[0], rtol=1e-6)
