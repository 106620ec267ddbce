"""K2's recipes against the report, from one table with sources, by Megatron's parser and schedule.

The table is written from the report (arXiv:2507.20534) and the released config alone.
"""

import argparse
from types import SimpleNamespace

import pytest
from megatron.training import global_vars
from megatron.training.arguments import add_megatron_arguments
from megatron.training.training import get_optimizer_param_scheduler

from megatron_k2.flags.megatron import add_k2_arguments
from megatron_k2.launch.overrides import apply
from megatron_k2.recipes import get_recipe

PAPER, CONFIG = "arXiv:2507.20534 ", "config.json of moonshotai/Kimi-K2-Instruct: "
MOONLIGHT = "not stated for K2; Moonlight, arXiv:2502.16982 "
CONSTANTS = (  # (argument, value, source)
    ("weight_decay", 0.1, PAPER + "2.5: throughout"),
    ("start_weight_decay", None, "no increase: it is the value itself"),
    ("muonclip", True, PAPER + "2.1"),
    ("qk_clip_threshold", 100.0, PAPER + "2.1: tau"),
    ("muon_extra_scale_factor", 0.2, PAPER + "algorithm 1"),
    ("muon_scale_mode", "spectral", PAPER + "algorithm 1: sqrt(max(n, m))"),
    ("muon_momentum", 0.95, MOONLIGHT + "2.2"),
    ("muon_nesterov", True, MOONLIGHT + "2.2, footnote"),
    ("muon_num_ns_steps", 5, MOONLIGHT + "2.2"),
    ("adam_beta1", 0.9, MOONLIGHT + "2.2"),
    ("adam_beta2", 0.95, MOONLIGHT + "2.2"),
    ("clip_grad", 1.0, "not stated: choice"),
    ("num_layers", 61, PAPER + "table 2"),
    ("num_experts", 384, PAPER + "table 2"),
    ("moe_router_topk", 8, PAPER + "table 2"),
    ("moe_layer_freq", [0] + [1] * 60, PAPER + "table 2: one dense layer"),
    ("num_attention_heads", 64, PAPER + "table 2"),
    ("moe_router_num_groups", None, CONFIG + "n_group 1, and " + PAPER + "2.3: no grouping"),
    ("moe_router_score_function", "sigmoid", CONFIG + "scoring_func"),
    ("moe_router_topk_scaling_factor", 2.827, CONFIG + "routed_scaling_factor"),
    ("moe_router_enable_expert_bias", True, CONFIG + "topk_method noaux_tc"),
    ("moe_router_load_balancing_type", ["seq_aux_loss"], CONFIG + "seq_aux"),
    ("moe_aux_loss_coeff", [0.001], CONFIG + "aux_loss_alpha"),
    ("moe_router_bias_update_rate", 0.001, MOONLIGHT + "3.3"),
    ("moe_router_dtype", "fp32", "not stated: choice, as DeepSeek-V3's code"),
    ("pipeline_model_parallel_size", 16, PAPER + "2.4.2"),
    ("expert_model_parallel_size", 16, PAPER + "2.4.2"),
    ("tensor_model_parallel_size", 1, PAPER + "2.4.2 names none"),
    ("use_distributed_optimizer", True, PAPER + "2.4.2: ZeRO-1"),
    ("fp8_activation_storage", True, PAPER + "2.4.4"),
)

MIDDLE = 2e-5 - (2e-5 - 7e-6) * 400 / 460
T, B, STEP = 10**12, 10**9, 2**26
BOUNDARIES = (  # (phase, tokens into it, rate, sequence, batch, source)
    ("pretrain", 0, 0.0, 4096, 16384, "2.5: warm-up of 500 steps"),
    ("pretrain", 500 * STEP, 2e-4, 4096, 16384, "2.5: 2e-4"),
    ("pretrain", 10 * T, 2e-4, 4096, 16384, "2.5: for the first 10T tokens"),
    ("pretrain", 12.75 * T, 1.1e-4, 4096, 16384, "2.5: cosine; half way, half the fall"),
    ("pretrain", 15.5 * T, 2e-5, 4096, 16384, "2.5: to 2e-5 over 5.5T"),
    ("anneal_4k", 0, 2e-5, 4096, 16384, "2.5: from 2e-5"),
    ("anneal_4k", 400 * B, MIDDLE, 4096, 16384, "2.5: 400B tokens; linear is a choice"),
    ("long_32k", 0, MIDDLE, 32768, 2048, "the same line goes on"),
    ("long_32k", 60 * B, 7e-6, 32768, 2048, "2.5: 60B tokens, to 7e-6"),
    ("yarn_128k", 0, 7e-6, 131072, 512, "2.5: to 128k by YaRN; the rate is a choice"),
    ("yarn_128k", 300 * STEP, 7e-6, 131072, 512, "300 steps are a choice"),
)
PHASES = ("pretrain", "anneal_4k", "long_32k", "yarn_128k")


def _arguments(recipe):
    """As Megatron's parser reads the recipe's whole flag list: the last of a name wins."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return add_k2_arguments(parser).parse_args(recipe.to_megatron_args("runs/x"))


def _differing(args):
    return {
        name: (getattr(args, name), value)
        for name, value, _ in CONSTANTS
        if getattr(args, name) != value
    }


@pytest.mark.parametrize("phase", PHASES)
def test_constants_are_the_reports_in_every_phase(phase):
    recipe = get_recipe(f"kimi_k2_{phase}_1024gpu_h200")
    args = _arguments(recipe)
    assert _differing(args) == {}
    # 128k, of whose layout the report says nothing, has no room in 80 GB without it
    small = _differing(_arguments(get_recipe(f"kimi_k2_{phase}_1024gpu_h100")))
    assert small == ({"tensor_model_parallel_size": (4, 1)} if phase == "yarn_128k" else {})
    ends = {phase: tokens for phase, tokens, *_ in BOUNDARIES}  # the last of each
    assert args.train_samples == ends[phase] // args.seq_length
    other = apply(recipe, ["extra_flags=--weight-decay,0.05,--moe-router-topk,6"])
    assert set(_differing(_arguments(other))) == {"weight_decay", "moe_router_topk"}


def _rate(args, tokens, monkeypatch):
    """What Megatron sets once ``tokens`` were seen, by the scheduler it builds of ``args``."""
    args.start_weight_decay = args.end_weight_decay = args.weight_decay  # as its validation does
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    monkeypatch.setenv("RANK", "0")
    scheduler = get_optimizer_param_scheduler(SimpleNamespace(param_groups=[{}]))
    scheduler.step(int(tokens) // args.seq_length)
    (group,) = scheduler.optimizer.param_groups
    return group["lr"]


@pytest.mark.parametrize(("phase", "tokens", "rate", "sequence", "batch", "source"), BOUNDARIES)
def test_rate_batch_and_sequence_at_every_boundary(
    phase, tokens, rate, sequence, batch, source, monkeypatch
):
    recipe = get_recipe(f"kimi_k2_{phase}_512gpu_h200")
    args = _arguments(recipe)
    assert (args.seq_length, args.global_batch_size) == (sequence, batch)
    assert args.max_position_embeddings == sequence
    assert args.seq_length * args.global_batch_size == STEP
    assert args.rope_type == ("yarn" if phase == "yarn_128k" else "rope")
    # A sequence more or less of 15.5T tokens, and a cosine: 1e-8 of the rate.
    assert _rate(args, tokens, monkeypatch) == pytest.approx(rate, rel=1e-8, abs=1e-12), source


def test_a_cosine_that_begins_late_is_told_apart(monkeypatch):
    (rate,) = (rate for _, tokens, rate, *_ in BOUNDARIES if tokens == 12.75 * T)
    late = apply(get_recipe("kimi_k2_pretrain_512gpu_h200"), ["phase.decay_tokens=5000000000000"])
    assert _rate(_arguments(late), 12.75 * T, monkeypatch) != pytest.approx(rate, rel=1e-2)
