"""Frozen weights in block FP8: the format against its oracle, gradients, what backward keeps."""

import gc

import pytest
import torch

from megatron_k2.checkpoint.block_fp8.reference import dequantize, quantize
from megatron_k2.fp8.frozen import dequantize_blocks, hold_in_fp8, quantize_blocks


def weight(m, n, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(m, n, generator=generator) * 0.02).to(dtype)


@pytest.mark.parametrize("shape", [(256, 384), (130, 129), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_values_are_the_oracles(shape, dtype):
    source = weight(*shape, dtype=dtype)
    source[:1] = 0
    codes, scales = quantize_blocks(source)
    expected, expected_scales = quantize(source)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    back = dequantize_blocks(codes, scales, dtype)
    assert torch.equal(back, dequantize(expected, expected_scales, dtype))


class Two(torch.nn.Module):
    """Two linears, of which the second is used by the owner itself."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(64, 256, bias=False)
        self.second = torch.nn.Linear(256, 64, bias=False)
        for seed, linear in enumerate((self.first, self.second)):
            linear.weight.data.copy_(weight(*linear.weight.shape, seed=seed))
            linear.weight.requires_grad_(False)

    def forward(self, x):
        return torch.relu(self.first(x)) @ self.second.weight.mT


def held():
    model = Two()
    hold_in_fp8([(model, [model.first, model.second])])
    return model


def test_outputs_and_gradients_are_those_of_the_widened_weights():
    model, plain = held(), Two()
    for name in ("first", "second"):
        getattr(plain, name).weight.data.copy_(getattr(model, name).weight)
        assert not torch.equal(getattr(plain, name).weight, getattr(Two(), name).weight)
    x = weight(8, 64, seed=3)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = model(found), plain(expected)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(found.grad, expected.grad)


def test_backward_keeps_codes_and_no_widened_weight():
    model = held()
    out = model(weight(8, 64, seed=3).requires_grad_())
    gc.collect()
    widened = [
        t
        for t in gc.get_objects()
        if issubclass(type(t), torch.Tensor)
        and t.dtype == torch.float32
        and t.shape in ((256, 64), (64, 256))
    ]
    assert not widened
    out.sum().backward()


def test_a_cast_of_the_model_leaves_codes_as_they_are():
    model = held()
    before = model.first.weight.clone()
    model.bfloat16()
    assert torch.equal(model.first.weight, before)
    assert sum(p.element_size() * p.numel() for p in model.parameters()) == 2 * 64 * 256


def test_another_tensor_at_the_address_of_one_that_is_gone_is_not_taken_for_it():
    model = held()
    given = model.first.parametrizations.weight[0]._given
    alive = model.first.weight
    entry = given._alive[alive.data_ptr()]
    assert given.pack(alive) is not alive
    del alive
    assert not given._alive
    other = torch.empty(256, 64)
    given._alive[other.data_ptr()] = entry  # as if it had not been forgotten
    assert given.pack(other) is other


def test_a_weight_that_trains_is_refused():
    model = Two()
    model.first.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trains"):
        hold_in_fp8([(model, [model.first])])
