"""The core attention against one fp64 einsum: outputs, gradients, S_max, blocks, masks, memory.

Tolerances: fp64 compares two orders of summation of at most 64 terms, 1e-12. fp32 has 2⁻²⁴ a
rounding and sums of some tens of terms of either sign: 1e-5 of the largest magnitude. Context
parallelism is in ``test_layer_on_two_ranks.py``.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_k2.model.attention import MLACoreAttention, causal_attention
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from tests.oracles.attention import (
    attention_that_peeks_one_token_ahead,
    einsum_attention,
    forbidden_across_documents,
    forbidden_causal,
)
from tests.support.devices import DEVICES, here, on_device

SCALE = 0.37
HEADS = 3


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _device(request):
    with on_device(request.param):
        yield


class SingleRank:
    """Group of one rank: all the core asks of it when nothing is parallel."""

    def size(self):
        return 1

    def rank(self):
        return 0


def _qkv(s=13, dtype=torch.float64, b=2, h=HEADS, d=6, d_v=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, s, d), (b, h, s, d), (b, h, s, d_v))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(dtype.is_floating_point)
        for shape in shapes
    ]


def _relative(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def _compare(dtype, oracle):
    """Worst relative difference of output, S_max and the three gradients."""
    inputs = _qkv(dtype=dtype)
    twins = [t.detach().double().requires_grad_() for t in inputs]
    out, max_logit = causal_attention(*inputs, SCALE)
    expected, expected_max = oracle(*twins, SCALE, forbidden_causal(13, 13))
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, inputs, direction.to(out.dtype))
    expected_grads = torch.autograd.grad(expected, twins, direction.to(out.dtype).double())
    pairs = [(out, expected), (max_logit, expected_max), *zip(grads, expected_grads, strict=True)]
    return [_relative(found, wanted) for found, wanted in pairs]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_gradients_and_maxima_equal_the_einsum(dtype, bound, record_property):
    differences = _compare(dtype, einsum_attention)
    record_property("difference", max(differences))
    record_property("bar", bound)
    assert max(differences) < bound, differences


def test_an_off_by_one_diagonal_is_seen_in_output_and_gradients():
    out, _, *grads = _compare(torch.float64, attention_that_peeks_one_token_ahead)
    assert min(out, *grads) > 1e-3


def test_the_largest_logit_of_these_inputs_is_a_forbidden_one():
    """So that the comparison of S_max above fails for a maximum taken before the mask."""
    q, k, v = _qkv()
    nothing = torch.zeros(13, 13, dtype=torch.bool)
    _, unmasked = einsum_attention(q, k, v, SCALE, nothing)
    _, causal = einsum_attention(q, k, v, SCALE, forbidden_causal(13, 13))
    assert (unmasked > causal + 1e-3).any()


@pytest.mark.parametrize("block_bytes", [1, 1 << 20], ids=["one row", "one block"])
def test_backward_equals_finite_differences(block_bytes):
    inputs = _qkv(s=4, b=1, h=2, d=3, d_v=2)

    def output(q, k, v):
        return causal_attention(q, k, v, SCALE, block_bytes=block_bytes)[0]

    assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_any_block_size_gives_the_result_of_one_block(rows):
    """Same products, but sums of another length: a few ulp of fp64."""
    inputs = _qkv(s=13)
    one, one_max = causal_attention(*inputs, SCALE)
    many, many_max = causal_attention(*inputs, SCALE, block_bytes=rows * 2 * HEADS * 13 * 8)
    torch.testing.assert_close(many, one, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(many_max, one_max, rtol=1e-15, atol=0)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (one, many)]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, torch.Tensor):
                self.num_bytes = max(self.num_bytes, leaf.numel() * leaf.element_size())
        return out


def test_logits_in_memory_stay_under_the_bound_and_none_are_saved():
    s, block_bytes = 2048, 2 << 20
    inputs = _qkv(s=s, dtype=torch.float32, b=1, h=2, d=8, d_v=8)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, _ = causal_attention(*inputs, SCALE, block_bytes=block_bytes)
        out.sum().backward()
    whole = 2 * s * s * 4
    assert largest.num_bytes <= block_bytes < whole / 10
    assert max(saved) <= 2 * s * 8


def test_one_block_at_the_same_size_would_break_the_memory_bound():
    inputs = _qkv(s=512, dtype=torch.float32, b=1, h=2, d=8, d_v=8)
    with LargestTensor() as largest:
        causal_attention(*inputs, SCALE, block_bytes=1 << 30)
    assert largest.num_bytes == 2 * 512 * 512 * 4


def test_half_precision_inputs_are_computed_in_fp32():
    inputs = [t.detach() for t in _qkv(s=64, dtype=torch.bfloat16)]
    out, max_logit = causal_attention(*inputs, SCALE)
    exact, exact_max = causal_attention(*(t.float() for t in inputs), SCALE)
    assert out.dtype == torch.bfloat16
    assert max_logit.dtype == torch.float32
    assert torch.equal(out, exact.bfloat16())
    assert torch.equal(max_logit, exact_max)


def test_equal_logits_far_beyond_the_range_of_exp_do_not_overflow():
    q, k, v = (t.detach() for t in _qkv(dtype=torch.float32))
    out, max_logit = causal_attention(q * 0 + 100, k * 0 + 100, v, 1.0)
    means = v.cumsum(2) / torch.arange(1, 14)[:, None]
    torch.testing.assert_close(out, means, rtol=1e-5, atol=1e-6)
    assert max_logit.tolist() == [6e4] * HEADS


def _core(**overrides):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * 6,
        num_attention_heads=HEADS,
        attention_dropout=overrides.pop("attention_dropout", 0.0),
        use_cpu_initialization=True,
    )
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = SingleRank()
    core = MLACoreAttention(
        config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=SCALE,
        pg_collection=groups,
    )
    return core.to(here())


def _sbhd(s=13, b=2, seed=0, dtype=torch.float64):
    return [t.detach().permute(2, 0, 1, 3) for t in _qkv(s=s, b=b, seed=seed, dtype=dtype)]


LENGTHS = [4, 1, 6, 2]


def _as_separate_documents(core, q, k, v):
    parts = zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True)
    return torch.cat([core(*part) for part in parts])


def test_packed_documents_equal_a_block_diagonal_mask_and_separate_documents():
    q, k, v = _sbhd(b=1)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = SimpleNamespace(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    forbidden = forbidden_across_documents(LENGTHS)
    cores = [_core().train() for _ in range(3)]
    thd = cores[0](q[:, 0], k[:, 0], v[:, 0], packed_seq_params=packed)
    masked = cores[1](q, k, v, attention_mask=forbidden[None, None])
    separate = _as_separate_documents(cores[2], q, k, v)
    bhsd = [t.permute(1, 2, 0, 3) for t in (q, k, v)]
    expected, expected_max = einsum_attention(*bhsd, SCALE, forbidden)
    expected = expected.permute(2, 0, 1, 3).flatten(2)
    for found in (thd[:, None], masked, separate):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for core in cores:
        torch.testing.assert_close(
            core.current_max_attn_logits, expected_max.float(), rtol=1e-6, atol=0
        )
    causal_only = _core()(q, k, v)
    assert (causal_only - expected).abs().max() > 1e-2


def test_mask_in_blocks_equals_mask_in_one_block():
    inputs = _qkv(s=13)
    forbidden = forbidden_across_documents(LENGTHS)
    outs = [
        causal_attention(*inputs, SCALE, mask=forbidden[None, None], block_bytes=size)[0]
        for size in (1, 1 << 20)
    ]
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-13, atol=1e-14)
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_maxima_are_recorded_in_training_only_in_place_and_run_over_micro_batches():
    core = _core().train()
    storage = core.current_max_attn_logits.data_ptr()
    micro_batches = [_sbhd(seed=seed) for seed in (1, 2, 3)]
    maxima = []
    for q, k, v in micro_batches:
        core(q, k, v)
        bhsd = [t.permute(1, 2, 0, 3) for t in (q, k, v)]
        maxima.append(einsum_attention(*bhsd, SCALE, forbidden_causal(13, 13))[1])
    expected = torch.stack(maxima).amax(0).float()
    torch.testing.assert_close(core.current_max_attn_logits, expected, rtol=1e-6, atol=0)
    assert len({tuple(m.tolist()) for m in maxima}) == 3
    before = core.current_max_attn_logits.clone()
    core.eval()(*(10 * t for t in micro_batches[0]))
    assert torch.equal(core.current_max_attn_logits, before)
    assert core.current_max_attn_logits.data_ptr() == storage


def test_a_recomputed_forward_records_the_same_maxima():
    inputs = [t.requires_grad_() for t in _sbhd()]
    plain, recomputed = _core().train(), _core().train()
    plain(*inputs).sum().backward()
    out = torch.utils.checkpoint.checkpoint(recomputed, *inputs, use_reentrant=True)
    after_forward = recomputed.current_max_attn_logits.clone()
    out.sum().backward()
    assert torch.equal(after_forward, plain.current_max_attn_logits)
    assert torch.equal(recomputed.current_max_attn_logits, plain.current_max_attn_logits)


def test_one_packed_tensor_receives_every_layers_maxima():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.core_attention = _core()
            self.num_attention_heads_per_partition = (
                self.core_attention.current_max_attn_logits.numel()
            )
            self.weight = torch.nn.Parameter(torch.zeros(1))

    model = torch.nn.ModuleList([Attention() for _ in range(3)]).train()
    maxima = MaxLogits([model])
    alone = [_core().train() for _ in range(3)]
    for layer, (module, core) in enumerate(zip(model, alone, strict=True)):
        inputs = _sbhd(seed=layer)
        module.core_attention(*inputs)
        core(*inputs)
    expected = torch.stack([core.current_max_attn_logits for core in alone])
    assert torch.equal(maxima.running, expected)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="attention-dropout 0"):
        _core(attention_dropout=0.1)
    core, (q, k, v) = _core(), _sbhd()
    with pytest.raises(ValueError, match="bias"):
        core(q, k, v, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="'bshd'"):
        core(q, k, v, packed_seq_params=SimpleNamespace(qkv_format="bshd"))
