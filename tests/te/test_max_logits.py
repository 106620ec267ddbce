"""S_max through TE's ``return_max_logit`` against the local attention's, and what the clip does.

fp32: the same products in another order, 1e-6 relative. bf16: the output's dtype, half a step of
2⁻⁸. Not exercised: cuDNN's fused attention, whose statistic is its own.
"""

from dataclasses import replace

import pytest
import torch

from tests.support.single_rank import SMALL, one_rank
from tests.te.models import batch, pair, token_losses


@pytest.fixture(scope="module", autouse=True)
def _rank(_transformer_engine):
    with one_rank():
        yield


def _forward(model, seed):
    with torch.no_grad():
        return token_losses(model, *batch(seed=seed))


def _recorder(model):
    from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits

    return MaxLogits([model])


def _step(recorder, model, training_seeds, evaluation_seed=2):
    """S_max [layers, heads] of a step of several micro-batches, each followed by an evaluation."""
    for seed in training_seeds:
        _forward(model.train(), seed)
        _forward(model.eval(), evaluation_seed)
    model.train()
    return recorder.take(torch.distributed.group.WORLD)


def test_a_steps_maxima_equal_the_local_attentions_and_forget_evaluation(host):
    local, te = pair()
    expected = _step(_recorder(local), local, (0, 1))
    recorder = _recorder(te)
    found = _step(recorder, te, (0, 1))
    assert found.shape == (SMALL.num_layers, SMALL.num_attention_heads)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    first, last, evaluated = (_step(recorder, te, (seed,)) for seed in (0, 1, 2))
    assert torch.equal(found, torch.maximum(first, last))
    assert not torch.equal(found, last), "keeping the last micro-batch alone would be seen"
    assert (evaluated > found).any(), "counting the evaluation would be seen"


def test_in_bf16_the_statistic_is_rounded_to_the_outputs_dtype(host):
    preset = replace(SMALL, moe_ffn_hidden_size=32)  # grouped_mm wants rows of 16 bytes
    local, te = pair("--bf16", preset=preset)
    found = _step(_recorder(te.bfloat16()), te, (0,))
    assert torch.equal(found, found.bfloat16().float())
    exact = _step(_recorder(local.bfloat16()), local, (0,))
    assert not torch.equal(exact, exact.bfloat16().float()), "ours is fp32 whatever the output is"
    # The first layer comes before any expert: later ones see what a route flipped by rounding did.
    assert ((found - exact) / exact)[0].abs().max() < 2**-8


def test_the_clip_scales_the_same_rows_by_the_same_factors(host):
    from megatron_k2.optimizer.qk_clip.apply import check_clippable, row_scales
    from megatron_k2.optimizer.settings import settings_from
    from tests.support.single_rank import arguments

    args = arguments(SMALL, "--qk-clip-threshold", "3.5")
    scales = []
    for model in pair("--qk-clip-threshold", "3.5"):
        recorder = _recorder(model)
        check_clippable(recorder)
        found = _step(recorder, model, (0,))
        assert (found > 3.5).any()
        assert (found <= 3.5).any()
        names = {param: name for name, param in model.named_parameters()}
        clipped = row_scales(recorder, settings_from(args, model.config))
        scales.append({names[param]: scale for param, scale in clipped})
    local, te = scales
    assert set(te) == set(local)
    for name, scale in te.items():
        torch.testing.assert_close(scale, local[name], rtol=1e-6, atol=0, msg=name)


def test_without_muonclip_te_is_left_free_to_choose_flash_attention():
    from tests.support.single_rank import build
    from tests.te.models import TE_FLAGS

    flags = [flag for flag in TE_FLAGS if flag != "--muonclip"]
    attention = build(SMALL, *flags).decoder.layers[0].self_attention
    assert not attention.core_attention.return_max_logit
    assert not hasattr(attention.core_attention, "current_max_attn_logits")
