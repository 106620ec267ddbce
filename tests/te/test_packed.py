"""Packed documents through Transformer Engine's attention (thd) against the local one.

fp32, TE's unfused attention, the same weights: losses, gradients and S_max of packs with padding
between and behind documents. Padding rows are zero behind every layer, so their logits are 0 in
TE's maximum, and left out of the local one: no difference while a head's maximum is positive. Not
exercised: cuDNN's fused attention, context parallelism.
"""

import pytest
import torch

from megatron_k2.model.moe import routers
from megatron_k2.model.packed import describe, lay_out
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from tests.support.single_rank import SMALL, one_rank
from tests.te.models import largest_difference, local_name, pair

LENGTHS, NUM_ROWS = [5, 12, 1, 7], 40
FLAGS = "--sft-data memory --moe-router-load-balancing-type none --moe-aux-loss-coeff 0".split()


@pytest.fixture(scope="module", autouse=True)
def _rank(_transformer_engine):
    with one_rank():
        yield


def _pack(model, multiple=4, lengths=LENGTHS):
    """Tokens, positions, labels [1, s] and the description, on the model's device."""
    device = next(model.parameters()).device
    layout = lay_out(lengths, NUM_ROWS, multiple)
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(SMALL.vocab_size, (2, 1, NUM_ROWS), generator=generator)
    positions = torch.from_numpy(layout.positions())[None]
    packed = describe(layout, layout.rows_of_rank(1, 0), device)
    return *(t.to(device) for t in (tokens, positions, labels)), packed


def _step(model, **kwargs):
    """Mean loss over tokens, gradients by local name, S_max and loads of one pack."""
    recorder = MaxLogits([model])
    tokens, positions, labels, packed = _pack(model, **kwargs)
    losses = model(tokens, positions, None, labels=labels, packed_seq_params=packed)
    loss = losses[positions >= 0].mean()
    loss.backward()
    gradients = {local_name(name): p.grad for name, p in model.named_parameters()}
    loads = [router.local_tokens_per_expert.clone() for router in routers([model])]
    return loss.detach(), gradients, recorder.take(torch.distributed.group.WORLD), loads


@pytest.mark.parametrize("multiple", [1, 4], ids=["padding behind", "padding between too"])
def test_a_pack_is_the_local_attentions(host, multiple, record_property):
    local, te = pair(*FLAGS)
    expected_loss, expected, expected_max, expected_loads = _step(local, multiple=multiple)
    loss, gradients, found_max, loads = _step(te, multiple=multiple)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    difference, name = largest_difference(gradients, expected)
    record_property("difference", difference)
    record_property("bar", 2e-5)
    assert difference < 2e-5, name
    assert (expected_max > 0).all()
    torch.testing.assert_close(found_max, expected_max, rtol=2e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(loads, expected_loads, strict=True))
    assert all(int(load.sum()) == sum(LENGTHS) * SMALL.moe_router_topk for load in loads)


def test_one_document_instead_of_several_would_be_seen(host):
    _, te = pair(*FLAGS)
    loss, _, found_max, _ = _step(te)
    whole, _, whole_max, _ = _step(te, lengths=[NUM_ROWS])
    assert abs(loss - whole) > 1e-3
    assert not torch.equal(found_max, whole_max)


def test_padding_rows_are_zero_behind_every_layer(host):
    _, te = pair(*FLAGS)
    tokens, positions, _, packed = _pack(te)
    seen = []
    for layer in te.decoder.layers:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0].detach()))
    te(tokens, positions, None, packed_seq_params=packed)
    assert len(seen) == SMALL.num_layers
    for hidden in seen:
        assert not hidden[positions[0] < 0].any()
        assert hidden[positions[0] >= 0].any(-1).all()


def test_what_the_attention_leaves_in_padding_is_not_trusted(host):
    """A kernel may leave anything there: the rows are set to zero."""
    _, te = pair(*FLAGS)
    tokens, positions, _, packed = _pack(te)

    def leave_nan(_core, _inputs, output):
        is_padding = (positions[0] < 0).view(-1, *[1] * (output.dim() - 1))
        return output.masked_fill(is_padding, torch.nan)

    for layer in te.decoder.layers:
        layer.self_attention.core_attention.register_forward_hook(leave_nan)
    logits = te(tokens, positions, None, packed_seq_params=packed)
    assert logits[positions >= 0].isfinite().all()
