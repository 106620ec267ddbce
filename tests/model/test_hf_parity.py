"""Logits and every gradient against ``transformers``' DeepseekV3ForCausalLM on the same weights.

An independent implementation of the same published architecture. Tolerance: fp32 with sums of up
to a few hundred terms in another order, a few ulp (1.2e-7) times their depth; 1e-5 relative to the
tensor's own largest magnitude. Not exercised: bf16, parallel layouts (tests/parallel), dropout.
"""

from dataclasses import replace

import pytest
import torch

from megatron_k2.checkpoint.hf.config import hf_config, without_yarn
from megatron_k2.checkpoint.names.mapping import classic_from_transformers, hf_state_to_megatron
from tests.support.devices import DEVICES, here
from tests.support.single_rank import SMALL, build, one_rank, randomise

SHAPES = {
    "k2": SMALL,
    "no_q_latent": replace(SMALL, q_lora_rank=None, num_shared_experts=2),
    "two_dense_layers": replace(SMALL, num_layers=4, num_dense_layers=2, moe_router_topk=2),
    "wide_rope": replace(SMALL, qk_pos_emb_head_dim=16, v_head_dim=24, num_attention_heads=2),
}
SEQ, BATCH = 64, 2


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


def _reference(preset, yarn):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **hf_config(preset if yarn else without_yarn(preset), model_type="deepseek_v3")
    )
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = DeepseekV3ForCausalLM(config).float().eval().to(here())
    randomise(model)
    return model


def _relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def _tokens(preset):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(preset.vocab_size, (BATCH, SEQ + 1), generator=generator)


def _both(preset, yarn, mutate=None):
    """(logits, named gradients) of ours and of transformers', keyed by Megatron's names."""
    reference = _reference(preset, yarn)
    tokens = _tokens(preset)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    expected = reference(inputs).logits
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    loss.backward()

    # transformers has no balance loss; ours would add its gradient to the router's.
    ours = build(preset, "--moe-router-load-balancing-type", "none", yarn=yarn).train()
    state = {name: p.detach() for name, p in reference.state_dict().items()}
    ours.load_state_dict(
        hf_state_to_megatron(classic_from_transformers(state), preset), strict=False
    )
    if mutate:
        mutate(ours)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    logits = ours(inputs, positions, None)
    ours_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    ours_loss.backward()

    reference_grads = {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in reference.named_parameters()
    }
    buffers = {n: torch.zeros_like(b) for n, b in state.items() if n not in reference_grads}
    grads = hf_state_to_megatron(classic_from_transformers(reference_grads | buffers), preset)
    pairs = {n: (p.grad, grads[n]) for n, p in ours.named_parameters() if p.grad is not None}
    return (logits, expected), pairs, dict(ours.named_parameters())


@pytest.mark.parametrize("yarn", [False, True], ids=["rope", "yarn"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_every_gradient_equal_transformers(shape, yarn, record_property):
    (logits, expected), grads, parameters = _both(SHAPES[shape], yarn)
    assert _relative(logits, expected) < 1e-5, f"logits differ by {_relative(logits, expected):.1e}"
    without_tokens = set(parameters) - set(grads)
    assert all("local_experts" in name for name in without_tokens)
    differences = {name: _relative(*pair) for name, pair in grads.items()}
    worst = max(differences, key=lambda name: differences[name])
    record_property("difference", differences[worst])
    record_property("bar", 1e-5)
    assert differences[worst] < 1e-5, f"{worst}: {differences[worst]:.1e}"


def _halves_swapped(model):
    for name, param in model.named_parameters():
        if name.endswith("linear_fc1.weight"):
            gate, up = param.data.chunk(2)
            param.data = torch.cat([up, gate])


def _rotary_read_as_halves(model):
    """What a loader does that takes interleaved rotary rows for half-split ones."""
    for layer in model.decoder.layers:
        weight = layer.self_attention.linear_kv_down_proj.weight
        rope = SMALL.qk_pos_emb_head_dim
        rows = weight.data[-rope:]
        weight.data[-rope:] = rows.view(rope // 2, 2, -1).transpose(0, 1).reshape(rope, -1)


@pytest.mark.parametrize("mutation", [_halves_swapped, _rotary_read_as_halves])
def test_a_wrong_weight_layout_is_seen_in_the_logits(mutation):
    (logits, expected), _, _ = _both(SMALL, False, mutate=mutation)
    assert _relative(logits, expected) > 1e-3


def test_gated_weights_use_the_selection_bias_for_selection_only():
    """With a bias large enough to dictate the choice, weights still come from unbiased scores."""
    preset = replace(SMALL, moe_router_topk=2)
    model = build(preset).eval()
    randomise(model)
    router = next(m for m in model.modules() if hasattr(m, "expert_bias"))
    router.expert_bias.copy_(torch.tensor([9.0, 8.0] + [0.0] * 6))
    hidden = torch.randn(5, 1, preset.hidden_size)
    probs, routing_map = router(hidden)
    scores = torch.sigmoid(hidden.flatten(0, 1) @ router.weight.T)[:, :2]
    expected = scores / scores.sum(-1, keepdim=True) * preset.moe_router_topk_scaling_factor
    assert routing_map[:, :2].all()
    torch.testing.assert_close(probs[:, :2], expected, rtol=1e-6, atol=1e-6)
