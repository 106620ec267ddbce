"""What was imported computes what transformers computes, at configurations drawn at random."""

import dataclasses
import json
import random
import shutil

import pytest
import torch

from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.verify.against_reference import compare_outputs
from megatron_k2.engine.mcore.compare_logits import compare_logits, logits_of
from megatron_k2.errors import UserError
from megatron_k2.presets import YarnScaling
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory


def random_preset(seed):
    """Of K2's architecture, every size drawn; half of them without q_lora, half with YaRN."""
    draw = random.Random(seed)
    num_experts = draw.choice([3, 4, 6, 8])
    num_heads = draw.choice([1, 2, 3, 4])
    has_yarn = seed % 2 == 0
    return dataclasses.replace(
        TINY,
        num_layers=draw.choice([2, 3]),
        num_dense_layers=draw.choice([0, 1]),
        hidden_size=8 * num_heads * draw.randint(1, 5),
        ffn_hidden_size=4 * draw.randint(3, 20),
        num_attention_heads=num_heads,
        q_lora_rank=draw.randint(5, 40) if seed % 4 < 2 else None,
        kv_lora_rank=draw.randint(5, 40),
        qk_head_dim=draw.randint(4, 20),
        qk_pos_emb_head_dim=2 * draw.randint(2, 8),
        v_head_dim=draw.randint(4, 20),
        num_moe_experts=num_experts,
        moe_router_topk=draw.randint(2, num_experts - 1),
        moe_ffn_hidden_size=8 * draw.randint(1, 5),
        num_shared_experts=draw.choice([1, 2]),
        vocab_size=draw.randint(30, 200),
        rotary_base=float(draw.choice([10000, 50000])),
        norm_epsilon=draw.choice([1e-5, 1e-6]),
        yarn=YarnScaling(4.0, 64, 2.0, 1.0, 1.0, 1.0) if has_yarn else None,
        max_position_embeddings=256,
    )


@pytest.mark.parametrize("seed", range(6))
def test_imported_weights_compute_transformers_logits(tmp_path, seed):
    preset = random_preset(seed)
    weights = random_weights(preset, torch.float32, seed)
    release = write_directory(tmp_path / "hf", preset, weights)
    import_hf(release, tmp_path / "megatron", ImportOptions())
    found = compare_logits(tmp_path / "megatron", release)
    assert found.max_abs_reference > 0.5
    assert found.max_abs_difference < 1e-5 * found.max_abs_reference
    assert found.argmax_agreement == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_in_bf16_only_ties_go_another_way_and_errors_are_transformers_own(tmp_path, seed):
    """Two orders of rounding: what bf16 costs transformers itself, against its fp32, is the bar."""
    preset = random_preset(seed)
    release = write_directory(tmp_path / "hf", preset, random_weights(preset))
    import_hf(release, tmp_path / "megatron", ImportOptions())
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, preset.vocab_size, (4, 48), generator=generator)
    exact = logits_of(release, tokens, "fp32")
    theirs = compare_outputs(logits_of(release, tokens, "bf16"), exact)
    ours = compare_outputs(logits_of(tmp_path / "megatron", tokens, "bf16"), exact)
    assert ours.mean_abs_difference < 1.25 * theirs.mean_abs_difference
    # the token that fp32 prefers loses only where it leads by less than 8 steps of bf16 at the
    # largest logit, or by no more than where transformers' bf16 loses it (a tie of two experts)
    rounding = 2**-5 * ours.max_abs_reference
    assert ours.largest_lost_margin <= max(rounding, theirs.largest_lost_margin)
    # one expert's matrix scaled by 1.2 is more than rounding
    name = f"model.layers.{preset.num_layers - 1}.mlp.experts.0.down_proj.weight"
    other = random_weights(preset)
    other[name] = other[name] * 1.2
    write_directory(tmp_path / "other", preset, other)
    wrong = compare_outputs(logits_of(tmp_path / "other", tokens, "bf16"), exact)
    assert wrong.mean_abs_difference > 1.25 * theirs.mean_abs_difference


def test_another_models_weights_are_seen(tmp_path):
    preset = random_preset(1)
    release = write_directory(tmp_path / "hf", preset, random_weights(preset, seed=1))
    other = write_directory(tmp_path / "other", preset, random_weights(preset, seed=2))
    import_hf(release, tmp_path / "megatron", ImportOptions())
    assert compare_logits(tmp_path / "megatron", other).max_abs_difference > 0.1


def test_deepseek_v3s_choice_among_groups_comes_along(tmp_path):
    preset = dataclasses.replace(random_preset(0), num_moe_experts=6, moe_router_topk=4)
    weights = random_weights(preset, torch.float32)
    release = write_directory(tmp_path / "hf", preset, weights, n_group=3, topk_group=2)
    import_hf(release, tmp_path / "megatron", ImportOptions())
    found = compare_logits(tmp_path / "megatron", release)
    assert found.max_abs_difference < 1e-5 * found.max_abs_reference
    one_group = write_directory(tmp_path / "one_group", preset, weights)
    assert compare_logits(tmp_path / "megatron", one_group).max_abs_difference > 1e-2


def rewritten(release, target, change):
    """A copy of a release with another config.json; the weights are the same."""
    shutil.copytree(release, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(change(config)))
    return target


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
@pytest.mark.parametrize(
    "change",
    [
        lambda c: c | {"rope_interleave": False},
        lambda c: c | {"rope_scaling": c["rope_scaling"] | {"attention_factor": 1.3}},
        lambda c: {key: value for key, value in c.items() if key != "n_group"},
        lambda c: c | {"hidden_act": "gelu"},
    ],
    ids=["halves", "attention factor", "eight groups", "gelu"],
)
def test_the_reference_is_transformers_reading_of_the_file_and_not_ours(tmp_path, dtype, change):
    """What an import refuses, so that only an independent reference can show it: the weights are
    imported under a config that says something else than the one they are compared by."""
    preset = dataclasses.replace(random_preset(0), num_moe_experts=16, moe_router_topk=4)
    weights = random_weights(preset, torch.float32)
    weights = as_fp8(weights) if dtype == "fp8" else weights
    release = write_directory(tmp_path / "hf", preset, weights)
    import_hf(release, tmp_path / "megatron", ImportOptions())
    same = compare_logits(tmp_path / "megatron", release)
    assert same.max_abs_difference < 1e-5 * same.max_abs_reference
    other = rewritten(release, tmp_path / "other", change)
    assert compare_logits(tmp_path / "megatron", other).max_abs_difference > 1e-2


def test_what_transformers_cannot_read_is_said(tmp_path):
    preset = random_preset(1)
    release = write_directory(tmp_path / "hf", preset, random_weights(preset))
    wrong = rewritten(release, tmp_path / "other", lambda c: c | {"num_attention_heads": "two"})
    with pytest.raises(UserError, match=r"config.json: transformers says: .*num_attention_heads"):
        compare_logits(release, wrong)
    weights = random_weights(preset)
    del weights["lm_head.weight"]
    lacking = write_directory(tmp_path / "lacking", preset, weights)
    with pytest.raises(UserError, match=r"1 tensors of the model are not .*: lm_head.weight"):
        compare_logits(release, lacking)
