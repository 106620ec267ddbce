"""Logits over the cache against transformers' whole forward pass of the same weights.

Sequences of different lengths go through in chunks of different sizes, mixed with decoding rows of
others, so that every position's logits come once from a chunk or a single row. fp32, 1e-5 of the
largest logit. Wrong variants: a row one position off, YaRN's factor of the softmax left out, the
router's bias in the shares.
"""

from dataclasses import replace

import pytest
import torch

from megatron_k2.engine.local import experts as experts_module
from megatron_k2.engine.local import model as model_module
from megatron_k2.engine.local.model import Chunk, LatentModel, Step, is_absorption_cheaper
from megatron_k2.engine.local.weights import Weights
from megatron_k2.errors import UserError
from tests.engine.local.models import SHAPES, TINY, reference, tokens, weights_of
from tests.support.devices import DEVICES, on_device

LENGTHS = (41, 7, 64, 23)


def expected_logits(model, sequences):
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in sequences]


def through_the_cache(engine, sequences, chunk=(16, 5, 64, 9), device="cpu"):
    """Logits of each position, from chunks first and then a token at a time, sequences mixed."""
    found = [[] for _ in sequences]
    done = [0] * len(sequences)
    prompt = [max(1, 2 * len(ids) // 3) for ids in sequences]
    while any(n < len(ids) for n, ids in zip(done, sequences, strict=True)):
        going = [i for i, ids in enumerate(sequences) if done[i] < len(ids)]
        decoding = [i for i in going if done[i] >= prompt[i]]
        chunks = [
            Chunk(i, done[i], min(chunk[i], prompt[i] - done[i]))
            for i in going
            if done[i] < prompt[i]
        ]
        step = Step(decoding, [done[i] for i in decoding], chunks)
        rows = [sequences[i][done[i]] for i in decoding]
        owners = list(decoding)
        for part in chunks:
            rows += sequences[part.slot][part.start : part.start + part.count]
            owners += [part.slot] * part.count
        logits = engine.logits(engine.forward(torch.tensor(rows, device=device), step)).cpu()
        for owner, row in zip(owners, logits, strict=True):
            found[owner].append(row)
            done[owner] += 1
    return [torch.stack(rows) for rows in found]


def largest_difference(found, expected):
    return max(
        ((f - e).abs().max() / e.abs().max()).item() for f, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_every_position_of_ragged_sequences_is_transformers(shape):
    preset = SHAPES[shape]
    model = reference(preset)
    sequences = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    engine = LatentModel(weights_of(model, preset), len(sequences), 64)
    found = through_the_cache(engine, sequences)
    assert largest_difference(found, expected_logits(model, sequences)) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_absorbed", [True, False])
def test_both_forms_of_attention_agree(is_absorbed, device, monkeypatch):
    monkeypatch.setattr(model_module, "is_absorption_cheaper", lambda *_: is_absorbed)
    model = reference(TINY)
    sequences = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    with on_device(device):
        engine = LatentModel(weights_of(model, TINY, device=device), len(sequences), 64)
        found = through_the_cache(engine, sequences, device=device)
    assert largest_difference(found, expected_logits(model.cpu(), sequences)) < 1e-5


@pytest.mark.parametrize(("given", "is_same"), [((4, 2), True), ((1, 1), False)])
def test_groups_of_experts_bound_the_choice(given, is_same):
    preset = replace(TINY, moe_router_topk=4)
    model = reference(preset, groups=(4, 2))
    sequences = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    engine = LatentModel(weights_of(model, preset, groups=given), len(sequences), 64)
    found = through_the_cache(engine, sequences)
    difference = largest_difference(found, expected_logits(model, sequences))
    assert difference < 1e-5 if is_same else difference > 1e-3


def test_experts_in_a_loop_and_grouped_agree(monkeypatch):
    model = reference(TINY)
    sequences = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    monkeypatch.setattr(experts_module, "MAX_GROUPED_ELEMENTS", 0)
    engine = LatentModel(weights_of(model, TINY), len(sequences), 64)
    found = through_the_cache(engine, sequences)
    assert largest_difference(found, expected_logits(model, sequences)) < 1e-5


def test_absorption_is_for_few_queries_of_many_keys():
    weights = weights_of(reference(TINY), TINY)
    assert is_absorption_cheaper(weights, 1, 1000)
    assert not is_absorption_cheaper(weights, 1000, 1000)


def test_a_copied_prefix_is_the_prefix():
    model, ids = reference(TINY), tokens(40)
    engine = LatentModel(weights_of(model, TINY), 2, 64)
    engine.forward(torch.tensor(ids[:30]), Step((), (), (Chunk(0, 0, 30),)))
    engine.copy_prefix(0, 1, 25)
    hidden = engine.forward(torch.tensor(ids[25:]), Step((), (), (Chunk(1, 25, 15),)))
    expected = expected_logits(model, [ids])[0][25:]
    assert largest_difference([engine.logits(hidden)], [expected]) < 1e-5


def test_bf16_is_near():
    """Not nearer: rounding decides some choices between experts otherwise."""
    model = reference(TINY)
    sequences = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    engine = LatentModel(weights_of(model, TINY, torch.bfloat16), len(sequences), 64)
    found = through_the_cache(engine, sequences)
    expected = expected_logits(model, sequences)
    for f, e in zip(found, expected, strict=True):
        assert torch.corrcoef(torch.stack([f.flatten(), e.flatten()]))[0, 1] > 0.95


def _shifted(monkeypatch):
    whole = Step.row_positions
    monkeypatch.setattr(Step, "row_positions", lambda self, device: whole(self, device) + 1)


def _without_mscale(monkeypatch):
    plain = replace(TINY, yarn=None)
    scale = model_module.softmax_scale(plain)
    monkeypatch.setattr(model_module, "softmax_scale", lambda _: scale)


def _bias_in_shares(monkeypatch):
    def routed(self, experts, x):
        p = self._preset
        scores = torch.nn.functional.linear(x.float(), experts.router).sigmoid() + experts.bias
        shares, chosen = scores.topk(p.moe_router_topk, -1)
        return chosen, shares / shares.sum(-1, keepdim=True) * p.moe_router_topk_scaling_factor

    monkeypatch.setattr(LatentModel, "_routed", routed)


@pytest.mark.parametrize("wrong", [_shifted, _without_mscale, _bias_in_shares])
def test_wrong_variants_are_found(wrong, monkeypatch):
    wrong(monkeypatch)
    model = reference(TINY)
    sequences = [tokens(n, seed) for seed, n in enumerate(LENGTHS)]
    engine = LatentModel(weights_of(model, TINY), len(sequences), 80)
    assert (
        largest_difference(through_the_cache(engine, sequences), expected_logits(model, sequences))
        > 1e-3
    )


def test_each_weight_comes_once_and_in_its_shape():
    weights = Weights(TINY, torch.float32, torch.device("cpu"))
    name = "model.norm.weight"
    with pytest.raises(UserError, match="never came"):
        weights.load([(name, torch.ones(48))])
    with pytest.raises(UserError, match="came twice"):
        weights.load([(name, torch.ones(48))] * 2)
    with pytest.raises(UserError, match=r"is \[47\], this model's is \[48\]"):
        weights.load([(name, torch.ones(47))])
    with pytest.raises(UserError, match="no weight of this model"):
        weights.load([("model.norm.bias", torch.ones(48))])


def test_weights_of_prediction_layers_are_passed_over():
    model = reference(TINY)
    from megatron_k2.checkpoint.names.mapping import classic_from_transformers

    named = classic_from_transformers(model.state_dict())
    named["model.layers.3.eh_proj.weight"] = torch.zeros(48, 96)
    weights = Weights(TINY, torch.float32, torch.device("cpu"))
    weights.load(named.items())
    assert torch.equal(weights.head, named["lm_head.weight"])


def test_a_release_in_block_fp8_is_dequantised(tmp_path):
    from safetensors.torch import save_file

    from megatron_k2.checkpoint.block_fp8 import reference as blocks
    from megatron_k2.checkpoint.hf.reader import HfSource
    from megatron_k2.checkpoint.stored_model import tensors_of

    weight = torch.randn(256, 130)
    codes, scales = blocks.quantize(weight)
    save_file({"a.weight": codes, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    ((name, found),) = tensors_of(HfSource(tmp_path))
    assert name == "a.weight"
    assert torch.equal(found, blocks.dequantize(codes, scales))
