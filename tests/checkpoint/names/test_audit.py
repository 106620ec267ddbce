import dataclasses
import time

import pytest

from megatron_k2.checkpoint.names.audit import audit, released_shapes, require_clean
from megatron_k2.checkpoint.names.mapping import expand
from megatron_k2.checkpoint.names.rules import RULES
from megatron_k2.errors import UserError
from megatron_k2.presets import K2_TINY, KIMI_K2, PRESETS

SMALL = dataclasses.replace(K2_TINY, num_layers=2, num_moe_experts=4, moe_router_topk=2)


WITH_MTP = dataclasses.replace(SMALL, num_mtp_layers=1)


def megatron_shapes(preset):
    return {pair.megatron: pair.megatron_shape for pair in expand(preset)}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_every_preset_is_accounted_for(preset):
    assert audit(megatron_shapes(preset), preset) == []


def test_k2_has_the_number_of_tensors_of_the_release():
    # 139,644 in the released index: 69,608 FP8 scales and 61 rotary buffers beside the weights
    assert len(released_shapes(KIMI_K2)) == 139_644 - 69_608 - 61


def test_auditing_the_whole_of_k2_takes_seconds():
    source = megatron_shapes(KIMI_K2)
    started = time.monotonic()
    require_clean(source, KIMI_K2)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("index", range(len(RULES)), ids=lambda i: RULES[i].megatron)
def test_a_removed_rule_names_its_orphans_on_both_sides(index):
    preset = WITH_MTP
    if RULES[index].has_q_lora is False:
        preset = dataclasses.replace(WITH_MTP, q_lora_rank=None)
    without = RULES[:index] + RULES[index + 1 :]
    whole, left = list(expand(preset)), list(expand(preset, without))
    orphans = {p.megatron for p in whole if not p.rule.is_copy}
    orphans -= {p.megatron for p in left if not p.rule.is_copy}
    unmade = {n for p in whole for n in p.hf} - {n for p in left for n in p.hf}
    findings = audit(megatron_shapes(preset), preset, without)
    consumed = {f.key for f in findings if "no rule consumes" in f.problem}
    produced = {f.key for f in findings if "no rule produces" in f.problem}
    assert consumed == orphans
    assert produced == unmade != set()
    with pytest.raises(UserError, match=min(orphans or unmade)):
        require_clean(megatron_shapes(preset), preset, without)


def test_a_rule_given_twice_is_found():
    findings = audit(megatron_shapes(SMALL), SMALL, (*RULES, RULES[0]))
    assert {(f.key, f.problem) for f in findings} == {
        ("embedding.word_embeddings.weight", "consumed by 2 rules"),
        ("model.embed_tokens.weight", "produced 2 times"),
    }


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("mtp.layers.0.enorm.weight", (128,), "no rule consumes"),
        ("decoder.final_layernorm.weight", (64,), r"has shape \[64\], expected \[128\]"),
        ("embedding.word_embeddings.weight", (4095, 128), "has shape"),
    ],
    ids=["unknown tensor", "other width", "too few rows"],
)
def test_a_checkpoint_of_another_model_is_refused(name, shape, problem):
    with pytest.raises(UserError, match=f"{name}: .*{problem}"):
        require_clean(megatron_shapes(SMALL) | {name: shape}, SMALL)


def test_a_checkpoint_with_fewer_layers_than_the_preset_names_what_is_missing():
    deeper = dataclasses.replace(SMALL, num_layers=3)
    with pytest.raises(UserError, match=r"layers\.2\..*not in the checkpoint"):
        require_clean(megatron_shapes(SMALL), deeper)


def test_vocabulary_padding_is_no_finding():
    padded = {"embedding.word_embeddings.weight": (4200, 128), "output_layer.weight": (4200, 128)}
    assert audit(megatron_shapes(SMALL) | padded, SMALL) == []
