"""Presets written as Megatron flags: order, translation, refusals, and what Megatron makes of them.

Every preset goes through Megatron's own parser, validation and config, K2 at full size under a
faked world of 2048 ranks. No model is built here.
"""

import sys

import pytest
import torch

from megatron_k2.data.manifest import DataManifest, SourceRecord, SplitRecord, TokenizerRecord
from megatron_k2.errors import UserError
from megatron_k2.flags import megatron as flags_module
from megatron_k2.flags.megatron import add_k2_arguments, expand, last_value
from megatron_k2.presets import PRESETS, get_preset


def _last(argv, name, cuda=False):
    return last_value(expand(argv, cuda=cuda), name)


def test_what_the_user_types_comes_after_the_preset_and_wins():
    typed = ["--preset", "k2-tiny", "--lr", "1e-5", "--num-layers=3", "--micro-batch-size", "1"]
    assert _last(typed, "--lr") == "1e-5"
    assert _last(typed, "--num-layers") == "3"
    assert _last(typed, "--hidden-size") == "128"
    assert _last(["--lr", "1e-5", "--preset=k2-tiny"], "--lr") == "1e-5"


def test_flags_of_the_platform_come_first_so_that_the_user_can_change_them_too():
    typed = ["--preset", "k2-tiny", "--num-workers", "2"]
    assert _last(typed, "--num-workers") == "2"
    assert _last(typed, "--distributed-backend") == "gloo"
    assert _last(typed, "--distributed-backend", cuda=True) == "nccl"


def test_the_last_vocabulary_wins_and_is_given_once():
    expanded = expand(["--preset", "k2-tiny", "--vocab-size", "8", "--vocab-size=512"], cuda=False)
    assert [expanded[i + 1] for i, flag in enumerate(expanded) if flag == "--vocab-size"] == ["512"]
    assert _last(["--preset", "k2-tiny"], "--vocab-size") == "4096"


def test_muonclip_becomes_what_megatrons_closed_list_accepts():
    expanded = expand(["--preset", "k2-tiny"], cuda=False)
    assert last_value(expanded, "--optimizer") == "muon"
    assert expanded.count("--muonclip") == 1
    assert "muonclip" not in expanded


def test_muonclip_over_zero_is_adam_to_megatrons_validation():
    expanded = expand(["--preset", "k2-tiny", "--use-distributed-optimizer"], cuda=False)
    assert last_value(expanded, "--optimizer") == "adam"
    assert expanded.count("--muonclip") == 1


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_another_optimizer_of_the_user_is_passed_on_without_muonclip(optimizer):
    expanded = expand(["--preset", "k2-tiny", f"--optimizer={optimizer}"], cuda=False)
    assert last_value(expanded, "--optimizer") == optimizer
    assert expanded.count("--optimizer") == 1
    assert "--muonclip" not in expanded


def test_mock_data_brings_a_tokenizer_unless_one_is_named():
    assert _last(["--preset", "k2-tiny", "--mock-data"], "--tokenizer-type") == "NullTokenizer"
    named = ["--preset", "k2-tiny", "--mock-data", "--tokenizer-type", "TikTokenizer"]
    assert expand(named, cuda=False).count("--tokenizer-type") == 1


def _manifest(vocab_size=4096, splits=("train", "valid")):
    return DataManifest(
        tokenizer=TokenizerRecord("bpe", "tokenizer", "0" * 64, vocab_size, 7),
        splits={name: SplitRecord(name, 1, 1, 1, 1) for name in splits},
        source=SourceRecord("text", 1, 1, 0, "0" * 64),
        plan_sha256="0" * 64,
    )


def test_a_data_directory_becomes_its_splits_and_its_end_of_document(monkeypatch):
    monkeypatch.setattr(flags_module, "read_manifest", lambda directory: _manifest())
    typed = ["--preset", "k2-tiny", "--data", "corpus"]
    assert _last(typed, "--train-data-path") == "corpus/train"
    assert _last(typed, "--valid-data-path") == "corpus/valid"
    assert _last(typed, "--null-tokenizer-eod-id") == "7"
    monkeypatch.setattr(flags_module, "read_manifest", lambda d: _manifest(splits=("train",)))
    assert _last(typed, "--valid-data-path") is None


def test_data_of_another_vocabulary_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(flags_module, "read_manifest", lambda directory: _manifest(512))
    typed = ["--preset", "k2-tiny", "--data", "corpus"]
    with pytest.raises(UserError, match=r"512 ids, the model's 4096 \(preset k2-tiny\)"):
        expand(typed, cuda=False)
    assert _last([*typed, "--vocab-size", "512"], "--vocab-size") == "512"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "k2-tinny"], "did you mean 'k2-tiny'"),
        (["--preset", "zzz"], "one of: kimi-k2"),
        (["--preset"], "--preset needs a value"),
        (["--yarn"], "--yarn takes its numbers from a preset"),
        (["--preset", "moonlight-16b-a3b", "--yarn"], "has no YaRN"),
    ],
)
def test_a_wrong_input_is_refused_with_the_way_out(argv, message):
    with pytest.raises(UserError, match=message):
        expand(argv, cuda=False)


FULL_SIZE = {
    "kimi-k2": (
        2048,
        [
            *"--pipeline-model-parallel-size 16 --expert-model-parallel-size 16".split(),
            *"--expert-tensor-parallel-size 1 --pipeline-model-parallel-layout".split(),
            "Et*3|t*3|t*3|(t*4|)*12t*4L",
        ],
    ),
    "moonlight-16b-a3b": (
        32,
        "--pipeline-model-parallel-size 1 --expert-model-parallel-size 8".split(),
    ),
    "k2-tiny": (1, []),
    "k2-mini": (2, []),
}


def _validated(name, monkeypatch, *extra, yarn=False):
    """Megatron's arguments and our model config for a preset at its full size."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_k2.host.cpu import megatron_host
    from megatron_k2.model.build import model_config_from_args

    world_size, layout = FULL_SIZE[name]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("RANK", "0")
    typed = ["--preset", name, "--mock-data", *layout, *extra, *(["--yarn"] if yarn else [])]
    monkeypatch.setattr(sys, "argv", ["train", *expand(typed, cuda=False)])
    with megatron_host():
        args = parse_args(add_k2_arguments)
        validate_args(args)
        args.padded_vocab_size = args.vocab_size
        return args, model_config_from_args(args)


@pytest.mark.parametrize(
    ("name", "yarn"),
    [(name, False) for name in PRESETS]
    + [(name, True) for name, preset in PRESETS.items() if preset.yarn],
)
def test_megatrons_config_has_every_number_of_the_preset(name, yarn, monkeypatch):
    preset = get_preset(name)
    args, model = _validated(name, monkeypatch, yarn=yarn)
    config = model.transformer
    same_name = """
        num_layers hidden_size ffn_hidden_size num_attention_heads q_lora_rank kv_lora_rank
        qk_head_dim qk_pos_emb_head_dim v_head_dim num_moe_experts moe_router_topk
        moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_topk_scaling_factor
        moe_router_bias_update_rate moe_aux_loss_coeff init_method_std rotary_base
    """.split()
    found = {field: getattr(config, field) for field in same_name}
    assert found == {field: getattr(preset, field) for field in same_name}
    assert config.layernorm_epsilon == preset.norm_epsilon
    assert model.latent_norm_epsilon == preset.latent_norm_epsilon
    assert config.moe_layer_freq == [0] * preset.num_dense_layers + [1] * preset.num_moe_layers
    assert (config.normalization, config.gated_linear_unit) == ("RMSNorm", True)
    assert config.activation_func is torch.nn.functional.silu
    assert (config.add_bias_linear, config.add_qkv_bias) == (False, False)
    assert (config.moe_router_score_function, config.moe_router_dtype) == ("sigmoid", "fp32")
    assert config.moe_router_enable_expert_bias
    assert config.moe_router_load_balancing_type == "seq_aux_loss"
    assert (config.attention_dropout, config.hidden_dropout) == (0.0, 0.0)
    assert config.qk_clip_threshold == preset.training.qk_clip_threshold
    assert (args.vocab_size, args.untie_embeddings_and_output_weights) == (preset.vocab_size, True)
    assert config.rope_type == ("yarn" if yarn else "rope")
    if yarn:
        fields = """
            rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale
            mscale_all_dim
        """.split()
        found = {field: getattr(config, field) for field in fields}
        assert found == {field: getattr(preset.yarn, field) for field in fields}


@pytest.mark.parametrize("name", PRESETS)
def test_megatrons_arguments_have_the_training_defaults_of_the_preset(name, monkeypatch):
    args, _ = _validated(name, monkeypatch)
    training = get_preset(name).training
    same_name = """
        seq_length micro_batch_size global_batch_size train_samples lr min_lr lr_warmup_samples
        lr_decay_samples lr_wsd_decay_samples weight_decay adam_beta1 adam_beta2 adam_eps
        muon_momentum clip_grad qk_clip_threshold
    """.split()
    found = {field: getattr(args, field) for field in same_name}
    assert found == {field: getattr(training, field) for field in same_name}
    assert args.muon_num_ns_steps == training.muon_ns_steps
    assert (args.muonclip, args.muon_nesterov) == (True, True)
    assert args.lr_decay_style == "WSD"


def test_megatron_reads_the_users_number_where_both_are_given(monkeypatch):
    args, model = _validated(
        "k2-tiny", monkeypatch, "--lr", "1e-2", "--hidden-size", "64", "--moe-bias-rule=mean-sign"
    )
    assert (args.lr, model.transformer.hidden_size) == (1e-2, 64)
    assert model.transformer.finalize_model_grads_func._rule == "mean-sign"


def test_upstreams_own_yarn_flag_still_does_not_reach_mla(monkeypatch):
    """Why ``--yarn-mla-beta-fast`` exists; when this fails it can go."""
    from megatron.training.argument_utils import gpt_config_from_args

    args, _ = _validated("k2-tiny", monkeypatch, "--yarn-beta-fast", "3.0", yarn=True)
    assert gpt_config_from_args(args).transformer.beta_fast == 32
