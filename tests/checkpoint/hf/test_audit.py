import dataclasses

import pytest

from megatron_k2.checkpoint.hf.audit import (
    audit_source,
    released_tensors,
    require_clean_source,
)
from megatron_k2.checkpoint.names.mapping import expand
from megatron_k2.checkpoint.names.rules import RULES
from megatron_k2.cli.convert import main
from megatron_k2.errors import UserError
from megatron_k2.presets import K2_TINY, PRESETS

SMALL = dataclasses.replace(K2_TINY, num_layers=2, num_moe_experts=4, moe_router_topk=2)


def test_the_release_of_k2_is_accounted_for_to_the_last_tensor(capsys):
    assert main(["audit", "--preset", "kimi-k2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("139,644 source tensors: 69,975 weights, 69,608 FP8 scales, 61 leftover")
    assert "none left over" in out


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "kimi-k2"])
def test_every_preset_is_accounted_for(name):
    assert audit_source(released_tensors(PRESETS[name]), PRESETS[name]).findings == ()


@pytest.mark.parametrize("index", range(len(RULES)), ids=lambda i: RULES[i].megatron)
def test_a_removed_rule_names_the_orphans(index):
    preset = dataclasses.replace(SMALL, num_mtp_layers=1)
    if RULES[index].has_q_lora is False:
        preset = dataclasses.replace(preset, q_lora_rank=None)
    without = RULES[:index] + RULES[index + 1 :]
    kept = {name for pair in expand(preset, without) for name in pair.hf}
    orphans = {name for pair in expand(preset) for name in pair.hf} - kept
    found = audit_source(released_tensors(preset), preset, rules=without)
    unconsumed = {f.key for f in found.findings if "no rule consumes" in f.problem}
    assert unconsumed == orphans
    with pytest.raises(UserError, match=min(orphans)):
        require_clean_source(found, "release")


def test_scales_that_fit_no_weight_are_found():
    source = released_tensors(SMALL)
    name = "model.layers.1.self_attn.o_proj.weight"
    scales = source[f"{name}_scale_inv"]
    wrong = {
        f"{name}_scale_inv": dataclasses.replace(scales, shape=(9, 9)),
        "model.norm.weight_scale_inv": scales,
    }
    found = audit_source(source | wrong, SMALL)
    assert {f.key for f in found.findings} == wrong.keys()
