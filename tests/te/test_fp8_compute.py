"""FP8 compute through Megatron's flags and TE's real recipes: what is quantised, how, and what not.

Numbers are those of the recipe, not of a tensor core: operands are quantised as TE asks, products
run in fp32. ``delayed`` and ``mxfp8`` have no stand-in: only their selection is tested.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_k2.flags.megatron import expand
from megatron_k2.fp8.compute import FP32_SCALES
from megatron_k2.presets import K2_TINY
from tests.oracles.attention import einsum_attention, forbidden_causal
from tests.support.paths import REPOSITORY
from tests.support.single_rank import one_rank
from tests.te.models import TE_FLAGS, batch, local_name, token_losses
from tests.te.worker import whole_weight

SMALL = replace(K2_TINY, num_layers=3, num_moe_experts=8, yarn=None)


@pytest.fixture(scope="module", autouse=True)
def _rank(_transformer_engine):
    with one_rank():
        yield


def _model(*flags):
    from tests.support.single_rank import build

    model = build(SMALL, *TE_FLAGS, "--bf16", *flags).train()
    for name, param in model.named_parameters():
        param.data.copy_(whole_weight(local_name(name), list(param.shape)))
    return model


def _blockwise():
    return _model(*expand(["--fp8-compute", "blockwise"], cuda=False)[-4:])


@pytest.fixture
def quantised(monkeypatch):
    """(operand's shape, block dimension, scales kept) of every quantisation that TE asks for."""
    from tests.te.standin import quantization

    seen = []
    original = quantization._quantized_fields

    def spy(x, quantizer):
        fields = original(x, quantizer)
        scales = [v[v != 0] for k, v in fields.items() if v is not None and "scale" in k]
        seen.append((tuple(x.shape), quantizer.block_scaling_dim, torch.cat(scales)))
        return fields

    monkeypatch.setattr(quantization, "_quantized_fields", spy)
    return seen


def _loss(model):
    loss = token_losses(model, *batch(SMALL)).float().mean()
    loss.backward()
    return loss.item()


def _is_power_of_two(scales):
    return scales.log2() == scales.log2().round()


def test_weights_are_quantised_in_blocks_and_activations_in_tiles_with_fp32_scales(quantised):
    model = _blockwise()
    _loss(model)
    linears = {
        tuple(p.shape)
        for n, p in model.named_parameters()
        if p.ndim == 2 and ("linear" in n or ".experts." in n)
    }
    blocks = {shape for shape, dim, _ in quantised if dim == 2}
    assert blocks == linears
    assert {dim for shape, dim, _ in quantised if shape not in linears} == {1}
    scales = torch.cat([kept for *_, kept in quantised])
    assert os.environ[FP32_SCALES] == "1"
    assert _is_power_of_two(scales).float().mean() < 0.1


def test_router_head_and_embedding_are_never_quantised(quantised):
    model = _blockwise()
    _loss(model)
    kept_out = {
        tuple(p.shape)
        for n, p in model.named_parameters()
        if "router" in n or n.startswith(("embedding", "output_layer"))
    }
    assert len(kept_out) == 2  # the router's, and one shape for embedding and head
    assert not kept_out & {shape for shape, *_ in quantised}
    assert model.decoder.layers[1].mlp.router.weight.grad is not None


def _max_logit(q, k, scale):
    """S_max [h] fp32 of [b, h, s, d] queries and keys, causal."""
    forbidden = forbidden_causal(q.shape[2], k.shape[2]).to(q.device)
    return einsum_attention(q, k, torch.zeros_like(k), scale, forbidden)[1].float()


def test_max_logits_are_those_of_unquantised_queries_and_keys(host):
    from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits

    model = _blockwise()
    recorder, handed = MaxLogits([model]), []
    for layer in model.decoder.layers:
        core = layer.self_attention.core_attention
        core.register_forward_pre_hook(lambda _core, inputs: handed.append(inputs[:2]))
    _loss(model)
    found = recorder.take(torch.distributed.group.WORLD)
    for row, (query, key), layer in zip(found, handed, model.decoder.layers, strict=True):
        q, k = (t.permute(1, 2, 0, 3) for t in (query, key))
        scale = layer.self_attention.softmax_scale
        torch.testing.assert_close(row, _max_logit(q, k, scale), rtol=2**-7, atol=0)
        wrong = _max_logit(*(t.to(torch.float8_e4m3fn) for t in (q, k)), scale)
        assert ((wrong - row) / row).abs().max() > 2**-7


def test_the_loss_is_near_that_of_bf16_but_not_it(host):
    exact, found = _loss(_model()), _loss(_blockwise())
    assert 1e-6 < abs(found - exact) / exact < 1e-2


@pytest.mark.parametrize(
    ("name", "recipe_class"),
    [
        ("blockwise", "Float8BlockScaling"),
        ("mxfp8", "MXFP8BlockScaling"),
        ("delayed", "TEDelayedScaling"),
    ],
)
def test_each_name_selects_its_recipe_of_te(name, recipe_class):
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_k2.model.build import model_config_from_args
    from tests.support.single_rank import arguments

    flags = expand(["--fp8-compute", name], cuda=True)
    chosen = flags[flags.index("--fp8-format") :]
    config = model_config_from_args(arguments(SMALL, *TE_FLAGS, "--bf16", *chosen)).transformer
    recipe = get_fp8_recipe(config)
    assert type(recipe).__name__ == recipe_class
    if name == "blockwise":
        assert not recipe.fp8_quant_fwd_weight.power_2_scale
        dims = (recipe.x_block_scaling_dim, recipe.w_block_scaling_dim)
        assert (*dims, recipe.grad_block_scaling_dim) == (1, 2, 1)
        assert recipe.fp8_format.name == "E4M3"


@pytest.mark.slow
def test_without_the_environment_switch_te_keeps_powers_of_two_whatever_the_recipe_says():
    program = (
        "from tests.te.standin import install; install()\n"
        "from transformer_engine.common.recipe import Float8BlockScaling\n"
        "print(Float8BlockScaling(use_f32_scales=True).fp8_quant_fwd_weight.power_2_scale)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    environment.pop(FP32_SCALES)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "True"
