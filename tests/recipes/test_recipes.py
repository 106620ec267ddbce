"""Recipes as data: chains, keys, fields, fit; and against Megatron's parser and its builder."""

import argparse
import itertools
import sys

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import add_k2_arguments, last_value
from megatron_k2.launch.blend import DataBlend
from megatron_k2.launch.overrides import apply
from megatron_k2.launch.row import source_of
from megatron_k2.launch.table import resolved
from megatron_k2.planning.cost.memory import rank_parameters
from megatron_k2.planning.memory_fit import shortfall
from megatron_k2.planning.phases import kimi_k2_phases
from megatron_k2.recipes import RECIPES, get_recipe
from megatron_k2.recipes.cpu import twins
from megatron_k2.training.dry_run import NEEDS_TE, dry_run

PHASES = ("pretrain", "anneal_4k", "long_32k", "yarn_128k")
CPU_TWINS = [name for name in RECIPES if name.endswith("_cpu")]


def _number(recipe, flag):
    return float(last_value(recipe.to_megatron_args("runs/x"), flag))


def test_phases_are_chained_by_name_and_only_the_hardware_differs():
    for before, after in itertools.pairwise(PHASES):
        assert get_recipe(f"kimi_k2_{after}_512gpu_h200").previous == (
            f"kimi_k2_{before}_512gpu_h200"
        )
        assert get_recipe(f"kimi_k2_{after}_cpu").previous == f"kimi_k2_{before}_cpu"
    one, other = (get_recipe(f"kimi_k2_pretrain_512gpu_{gpu}") for gpu in ("h100", "h200"))
    keys = {key for key, value in resolved(one).items() if resolved(other)[key] != value}
    assert keys <= {"layout.activation_offload"}


def test_a_later_phase_keeps_the_optimizer_and_resumes_from_its_own():
    recipe = get_recipe("kimi_k2_long_32k_cpu")
    flags = recipe.to_megatron_args("runs/b", "runs/a")
    assert "--keep-optimizer" in flags
    empty = apply(recipe, ["keeps_optimizer=false"])
    assert "--keep-optimizer" not in empty.to_megatron_args("runs/b", "runs/a")
    assert "--keep-optimizer" not in recipe.to_megatron_args("runs/b")
    for name in ("kimi_k2_pretrain_256gpu_h200", "kimi_k2_continue_256gpu_h200"):
        assert not get_recipe(name).keeps_optimizer  # nothing to keep
    assert last_value(flags, "--pretrained-checkpoint") == "runs/a"
    assert (last_value(flags, "--load"), last_value(flags, "--save")) == ("runs/b", "runs/b")


def test_a_recipe_that_continues_published_weights_asks_where_they_are(capsys):
    assert main(["launch", "kimi_k2_continue_cpu", "--dry-run"]) == 2
    assert "continues from an imported k2-tiny" in capsys.readouterr().err
    argv = ["launch", "kimi_k2_continue_256gpu_h800", "--start-from", "imported", "--print-args"]
    assert main(argv) == 0
    assert "--pretrained-checkpoint imported" in capsys.readouterr().out
    recipe = get_recipe("moonlight_16b_a3b_continue_8gpu_h100")
    assert recipe.imported == "Moonlight-16B-A3B"
    assert recipe.phase.lr < get_recipe("moonlight_16b_a3b_pretrain_8gpu_h100").phase.lr


@pytest.mark.slow
def test_every_recipe_builds_fits_and_names_its_sources():
    for name in RECIPES:
        recipe = get_recipe(name)
        recipe.layout.check()
        assert recipe.name == name
        assert all(source_of(recipe, key) for key in resolved(recipe))
        assert recipe.is_cpu or shortfall(recipe.layout) <= 0


def test_the_twins_keep_the_curves_shape():
    small = twins(kimi_k2_phases())
    assert [get_recipe(f"kimi_k2_{phase}_cpu").phase for phase in PHASES] == list(small)
    for phase, large in zip(small, kimi_k2_phases(), strict=True):
        part = phase.lr_at(phase.tokens) / small[0].lr
        assert part == pytest.approx(large.lr_at(large.tokens) / 2e-4, rel=1e-9)


@pytest.mark.parametrize("name", CPU_TWINS)
def test_megatron_accepts_the_twins_flags(name, monkeypatch):
    from megatron.training.arguments import parse_args, validate_args

    from megatron_k2.host.cpu import megatron_host

    recipe = get_recipe(name)
    monkeypatch.setenv("WORLD_SIZE", str(recipe.layout.world_size))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["train", *recipe.to_megatron_args("runs/x")])
    with megatron_host():
        args = parse_args(recipe.stage.program.arguments)
        validate_args(args)
    assert args.seq_length == recipe.phase.seq_length
    steps = args.train_iters or args.train_samples // args.global_batch_size
    assert steps == recipe.steps
    assert args.exit_signal_handler


def _without_te(recipe):
    """Flags but for those that Megatron refuses without Transformer Engine: no parameter's."""
    layout = recipe.layout.replace(recompute=frozenset(), fp8_storage=False, activation_offload=0.0)
    # the dry run brings mock data of its own
    flags = recipe.replace(layout=layout, data=DataBlend("data")).program_flags("runs/x")
    return [*(flag for flag in flags if flag not in NEEDS_TE), "--transformer-impl", "local"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "kimi_k2_pretrain_256gpu_h800",
        "kimi_k2_long_32k_256gpu_h800",
        "kimi_k2_yarn_128k_512gpu_h800",
        "moonlight_16b_a3b_pretrain_8gpu_h100",
    ],
)
def test_megatron_builds_every_distinct_full_size_layout_from_the_flags(name, monkeypatch):
    """Its first rank; all ranks of a layout are ``tests/training/test_dry_run.py``'s."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    recipe = get_recipe(name)
    built = next(dry_run(recipe.layout, _without_te(recipe)))
    assert built.parameters == rank_parameters(recipe.layout, 0)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("phase.lrr=1", "did you mean 'phase.lr'"),
        ("layout.seq_lenth=1", "no such key; did you mean 'phase.seq_length'"),
        ("layout.tp=many", "expected a number like 1"),
        ("layout.fp8_storage=1", "expected true or false"),
        ("checkpoint.interval", "expected KEY=VALUE"),
        ("layout.ep=3", "does not divide"),
        ("layout.world_size=128", "start a multiple of 256 ranks"),
        ("layout.recompute=swigluu", "swigluu is not one of"),
        ("phase.lr=-1", "expected lr above 0"),
        ("phase.min_lr=0.1", "min_lr from 0 to lr"),
        ("phase.tokens=0", "each is expected above 0"),
    ],
)
def test_a_wrong_assignment_is_refused_with_the_way_out(assignment, words):
    with pytest.raises(UserError, match=words):
        apply(get_recipe("kimi_k2_pretrain_256gpu_h800"), [assignment])


def test_a_layout_that_does_not_fit_is_refused_unless_forced():
    recipe = get_recipe("kimi_k2_pretrain_256gpu_h800")
    on_gpu = ["layout.vpp=1", "layout.activation_offload=0"]
    assert apply(recipe, on_gpu).layout.optimizer_offload > 0
    on_gpu.append("layout.optimizer_offload=0")
    with pytest.raises(UserError, match=r"GB a GPU too much.*--gpu h200"):
        apply(recipe, on_gpu)
    forced = apply(recipe, on_gpu, force=True)
    assert (forced.layout.vpp, forced.layout.activation_offload) == (1, 0)
    long = get_recipe("kimi_k2_yarn_128k_256gpu_h800")
    assert 0 < long.layout.optimizer_offload < 1
    assert "--optimizer-cpu-offload" in long.program_flags("runs/x")


def test_assignments_reach_the_flags_and_the_plan_follows():
    recipe = get_recipe("kimi_k2_pretrain_256gpu_h800")
    changed = apply(recipe, ["phase.lr=1e-4", "layout.world_size=512", "data.root=/lustre"])
    assert _number(changed, "--lr") == 1e-4
    assert changed.layout.activation_offload < recipe.layout.activation_offload
    assert "/lustre/web" in changed.to_megatron_args("runs/x")
    longer = apply(get_recipe("kimi_k2_pretrain_cpu"), ["phase.seq_length=128"])
    assert (longer.layout.seq_length, longer.layout.sequences_per_step) == (128, 16)


FLEX = "dispatch.dispatcher=flex"
TRACE = "profiler.tool=pytorch"


def test_dispatcher_and_profiler_are_fields_and_become_megatrons_flags():
    recipe = get_recipe("kimi_k2_pretrain_256gpu_h800")
    flags = recipe.to_megatron_args("runs/x")
    assert last_value(flags, "--moe-token-dispatcher-type") == "alltoall"
    assert "--profile" not in flags
    typed = [FLEX, "dispatch.num_sms=24", TRACE, "profiler.ranks=0,16", "profiler.shapes=true"]
    flags = apply(recipe, typed).to_megatron_args("runs/x")
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = add_k2_arguments(parser).parse_args(flags)
    assert args.moe_token_dispatcher_type == "flex"
    assert args.moe_flex_dispatcher_backend == "deepep"
    assert args.moe_flex_dispatcher_num_sms == 24
    assert (args.profile, args.use_pytorch_profiler) == (True, True)
    assert (args.profile_step_start, args.profile_step_end) == (11, 13)
    assert args.profile_ranks == [0, 16]
    assert args.pytorch_profiler_collect_shapes
    nsys = apply(recipe, ["profiler.tool=nsys"]).to_megatron_args("runs/x")
    assert "--nvtx-ranges" in nsys
    assert (last_value(nsys, "--profile-step-start"), last_value(nsys, "--profile-step-end")) == (
        "10",
        "12",
    )
    assert "--use-pytorch-profiler" not in nsys


@pytest.mark.parametrize(
    ("name", "assignments", "words"),
    [
        ("kimi_k2_pretrain_cpu", [FLEX], "its kernels are CUDA's"),
        ("kimi_k2_pretrain_256gpu_h200", ["dispatch.dispatcher=allgather"], "alltoall, flex"),
        ("kimi_k2_pretrain_256gpu_h200", [FLEX, "dispatch.backend=deep"], "deepep, hybridep"),
        ("kimi_k2_pretrain_256gpu_h200", [FLEX, "dispatch.num_sms=7"], "for DeepEP an even one"),
        ("kimi_k2_pretrain_256gpu_h200", ["dispatch.num_sms=8"], "without dispatch.dispatcher"),
        ("moonlight_16b_a3b_pretrain_64gpu_h200", [FLEX, "layout.ep=1"], "no token leaves"),
        ("kimi_k2_pretrain_cpu", ["profiler.tool=torch"], "off, pytorch, nsys"),
        ("kimi_k2_pretrain_cpu", [TRACE, "profiler.first_step=13"], "at least one"),
        ("kimi_k2_pretrain_cpu", [TRACE, "profiler.last_step=20"], "the run has 20 steps"),
        (
            "kimi_k2_pretrain_cpu",
            [TRACE, "profiler.ranks=1"],
            "1 is not a rank of 1",
        ),
        ("kimi_k2_pretrain_cpu", [TRACE, "profiler.ranks=a"], "'a' is not a number"),
    ],
)
def test_a_dispatcher_or_profiler_that_cannot_be_is_refused(name, assignments, words):
    with pytest.raises(UserError, match=words):
        apply(get_recipe(name), assignments, force=True)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'kimi_k2_pretrain_256gpu_h800'"):
        get_recipe("kimi_k2_pretrain_256gpu_h80")
