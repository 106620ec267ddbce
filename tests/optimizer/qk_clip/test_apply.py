"""QK-Clip on real Megatron attention modules: logits recomputed after the clip equal min(S, τ).

MHA and grouped queries through ``linear_qkv``, bias included; MLA is in ``test_muonclip.py``.
Same inputs before and after, fp32: products of scaled rows round once more, 4e-7 relative.
Sources that are not ours: one that assigns (Transformer Engine's way, by a stand-in) and one that
recomputes every k steps. Not exercised: Transformer Engine itself.
"""

import math

import pytest
import torch

from megatron_k2.errors import UserError
from megatron_k2.model.attention import MLACoreAttention
from megatron_k2.optimizer.qk_clip.apply import check_clippable, refuse_silent, row_scales
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.settings import MuonClipSettings
from tests.support.single_rank import one_rank

HEADS, HEAD_DIM, SEQ = 4, 8, 32


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


def _settings(mode="query", threshold=1.0):
    return MuonClipSettings(
        momentum=0.95,
        nesterov=True,
        coefficients="jordan",
        steps=5,
        scale_factor=0.2,
        dtype=torch.float32,
        qk_clip_threshold=threshold,
        qk_clip_alpha=0.5,
        grouped_query_mode=mode,
        has_idle_floor=False,
    )


def _attention(groups, *, bias=False, qk_norm=False, core=MLACoreAttention):
    """Megatron's ``SelfAttention`` with local modules and a core that records."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_k2.model.norm import RMSNorm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=0.0,
        add_bias_linear=bias,
        qk_layernorm=qk_norm,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    norm = RMSNorm if qk_norm else IdentityOp
    attention = SelfAttention(
        config,
        SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
    )
    generator = torch.Generator().manual_seed(groups)
    with torch.no_grad():
        for param in attention.parameters():
            param.copy_(0.4 * torch.randn(param.shape, generator=generator))
    return attention.train()


def _maxima(attention, maxima):
    hidden = torch.randn(SEQ, 2, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(7))
    maxima.running.fill_(-math.inf)
    attention(hidden, None)
    return maxima.running[0].clone()


def _clip(maxima, settings, exponent=1.0):
    maxima.finish()
    with torch.no_grad():
        for param, scale in row_scales(maxima, settings):
            param.mul_((scale**exponent).view(-1, *[1] * (param.ndim - 1)))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("groups", [HEADS, 2, 1], ids=["mha", "gqa", "mqa"])
def test_after_the_clip_every_head_is_at_the_threshold_or_where_it_was(groups, bias):
    attention = _attention(groups, bias=bias)
    maxima = MaxLogits([attention])
    before = _maxima(attention, maxima)
    threshold = before.median().item()
    _clip(maxima, _settings(threshold=threshold))
    after = _maxima(attention, maxima)
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=4e-7, atol=0)
    cold = before <= threshold
    assert torch.equal(after[cold], before[cold])


def test_the_group_rule_takes_innocent_heads_of_a_group_along():
    attention = _attention(2)
    maxima = MaxLogits([attention])
    before = _maxima(attention, maxima)
    hottest = before.view(2, 2).amax(1, keepdim=True).expand(2, 2).flatten()
    threshold = before.median().item()
    _clip(maxima, _settings("group", threshold))
    expected = before * (threshold / hottest).clamp(max=1)
    torch.testing.assert_close(_maxima(attention, maxima), expected, rtol=4e-7, atol=0)


def test_half_the_exponent_is_seen():
    """The wrong variant: sqrt(γ) on the query alone leaves the logit at sqrt(S τ)."""
    attention = _attention(2)
    maxima = MaxLogits([attention])
    before = _maxima(attention, maxima)
    threshold = before.median().item()
    _clip(maxima, _settings(threshold=threshold), exponent=0.5)
    assert (_maxima(attention, maxima) > 1.01 * threshold).any()


def test_a_norm_after_the_projection_makes_the_clip_void_and_is_refused():
    with pytest.raises(UserError, match="layer 1: q_layernorm normalises after the projection"):
        check_clippable(MaxLogits([_attention(4, qk_norm=True)]))
    check_clippable(MaxLogits([_attention(4)]))


class _Silent(torch.nn.Module):
    """Megatron's own ``DotProductAttention``, for one, says nothing of its logits."""

    def __init__(self, *_args, **_kwargs):
        super().__init__()

    def forward(self, query, *_rest, **_named):
        return query.flatten(2)


def test_attention_that_gives_no_maximum_logits_is_refused_and_not_left_unclipped():
    with pytest.raises(UserError, match=r"layer 1: its core attention .*_Silent gives no maximum"):
        check_clippable(MaxLogits([_attention(4, core=_Silent)]))


def test_attention_that_left_its_maximum_without_a_value_is_seen_after_a_step():
    """Transformer Engine's attribute is there whatever its version and backend return."""
    attention = _attention(4, core=_Assigns)
    maxima = MaxLogits([attention])
    check_clippable(maxima)
    maxima.finish()
    assert maxima.unrecorded() == [attention]
    with pytest.raises(UserError, match=r"_Assigns gives no maximum"):
        refuse_silent(maxima.unrecorded())
    _maxima(attention, maxima)
    maxima.finish()
    assert maxima.unrecorded() == []


class _Assigns(torch.nn.Module):
    """What Transformer Engine's attention does: a new bf16 tensor each forward, evaluation too."""

    def __init__(self, *_args, **_kwargs):
        super().__init__()
        self.current_max_attn_logits = None
        self.value = torch.zeros(HEADS)

    def forward(self, query, key, value, *_args, **_kwargs):
        old = self.current_max_attn_logits
        new = self.value.bfloat16()
        self.current_max_attn_logits = new if old is None else torch.maximum(old, new)
        return query.flatten(2)


def test_a_source_that_assigns_is_collected_in_training_only():
    attention = _attention(4, core=_Assigns)
    maxima = MaxLogits([attention])
    core = attention.core_attention
    core.value = torch.full((HEADS,), 9.0)
    attention.eval()
    _maxima(attention, maxima)
    assert (maxima.running == -math.inf).all()
    attention.train()
    for value in (3.0, 5.0, 4.0):
        core.value = torch.full((HEADS,), value)
        attention(torch.zeros(SEQ, 2, HEADS * HEAD_DIM), None)
    assert (maxima.running == 5.0).all()
