"""Padding of the vocabulary: no part of the loss, its gradient, or the initial weights.

The right value is the same model without padding. On a GPU Megatron draws each tensor-parallel
shard from a generator of its own, padding included, so there the weights are copied.
"""

import math

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from megatron_k2.model.vocabulary import mask_padding
from tests.support.devices import DEVICES
from tests.support.single_rank import SMALL, build, one_rank

SEED = 7
FUSED = ["--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native"]
MTP = ["--mtp-num-layers", "1"]
PADDING = 32


def _built(padding: int, *flags: str):
    destroy_moe_metrics_tracker()  # it has as many rows as the first model had layers
    torch.manual_seed(SEED)
    return build(SMALL, *flags, padded_vocab_size=SMALL.vocab_size + padding)


def _copy_rows(source, target) -> None:
    """The rows there are; those of padding are zero."""
    weights = dict(source.named_parameters())
    for name, param in target.named_parameters():
        param.data.zero_()[: weights[name].shape[0]] = weights[name].data


def _loss(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SMALL.vocab_size, (2, 17), generator=generator)
    positions = torch.arange(16).expand(2, 16)
    mask = torch.ones(2, 16)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=mask).sum()


@pytest.mark.parametrize("flags", [[], FUSED, MTP], ids=["plain", "fused", "mtp"])
@pytest.mark.parametrize("device", DEVICES)
def test_padding_changes_neither_loss_nor_gradient_nor_initial_weights(flags, device):
    with one_rank(device):
        whole, padded = _built(0, *flags), _built(PADDING, *flags)
        if device == "cuda":
            _copy_rows(whole, padded)
        losses = [_loss(model) for model in (whole, padded)]
        for loss in losses:
            loss.backward()
        # The gradient of multi-token prediction's own loss is in these too.
        expected = dict(whole.named_parameters())
        for name, found in padded.named_parameters():
            rows = expected[name].shape[0]
            assert torch.equal(found[:rows], expected[name]), name
            assert not found[rows:].any(), name
            torch.testing.assert_close(found.grad[:rows], expected[name].grad, rtol=1e-5, atol=1e-6)
            assert not found.grad[rows:].any(), name
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_softmax_over_the_padding_is_told_apart(device):
    """The comparison above can fail: zero rows alone cost about ln(padded / real) a token."""
    with one_rank(device):
        whole, padded = _built(0), _built(PADDING)
        if device == "cuda":
            _copy_rows(whole, padded)
        padded.output_layer._forward_hooks.clear()
        difference = (_loss(padded) - _loss(whole)).item() / 32
    ratio = (SMALL.vocab_size + PADDING) / SMALL.vocab_size
    assert difference == pytest.approx(math.log(ratio), rel=0.05)


@pytest.mark.parametrize(("rank", "masked"), [(0, []), (1, [2, 3]), (2, [0, 1, 2, 3])])
def test_each_tensor_parallel_rank_masks_its_own_columns(rank, masked):
    found = mask_padding(torch.zeros(1, 4), 6, rank)
    assert (found[0] == -torch.inf).nonzero().flatten().tolist() == masked
