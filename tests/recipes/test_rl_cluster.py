"""Recipes of RL on a cluster: what peers state, that every phase fits, what a launch shows."""

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value
from megatron_k2.launch.overrides import apply
from megatron_k2.launch.rl_plan import rl_request
from megatron_k2.planning.rl.fit import plan_memory
from megatron_k2.recipes import RECIPES, get_recipe
from megatron_k2.rl.checks import check_rl
from megatron_k2.run.flags import read_flags

K2 = "kimi_k2_rl_256gpu_h800"


def test_what_peers_state_is_what_the_recipe_has():
    recipe = get_recipe(K2)
    flags = recipe.to_megatron_args("runs/b")
    stated = {
        "--lr": "1e-06",
        "--prompts-per-iteration": "128",
        "--group-size": "8",
        "--mini-batches": "4",
        "--global-batch-size": "256",
        "--iterations": "100",
        "--tensor-model-parallel-size": "8",
        "--pipeline-model-parallel-size": "8",
        "--context-parallel-size": "4",
        "--expert-model-parallel-size": "32",
        "--train-iters": "400",
    }
    assert {flag: last_value(flags, flag) for flag in stated} == stated
    assert recipe.steps == 400, "what the checkpoints' tracker counts"
    assert last_value(flags, "--save-interval") == "20", "five iterations of four steps"
    assert last_value(flags, "--save-retain-interval") == "80"


def test_flags_that_are_expanded_stay_what_they_are():
    """``examples/rl_k2.sh`` gives them to a program that expands what it is given."""
    recipe = get_recipe(K2)
    once = recipe.to_megatron_args("runs/b")
    twice = recipe.stage.program.expand(once, cuda=True)
    names = {word for word in once if word.startswith("--")}
    assert {word for word in twice if word.startswith("--")} == names
    values = [{n: last_value([*words, "--"], n) for n in names} for words in (once, twice)]
    values = [{n: v for n, v in each.items() if not v.startswith("--")} for each in values]
    assert values[0] == values[1]
    assert values[0]["--save-interval"] == "20"


def test_what_reinforcement_learning_refuses_is_left_out(monkeypatch):
    monkeypatch.setattr("megatron_k2.training.preflight.require_transformer_engine", lambda: "2.20")
    recipe = get_recipe("kimi_k2_rl_512gpu_h800")
    flags = recipe.to_megatron_args("runs/b")
    check_rl(read_flags(flags), recipe.layout.world_size)
    overlap = "--overlap-param-gather"
    assert overlap not in flags
    assert overlap in get_recipe("kimi_k2_pretrain_512gpu_h800").to_megatron_args("runs/b")
    with pytest.raises(UserError, match=overlap):
        check_rl(read_flags([*flags, overlap]), recipe.layout.world_size)


@pytest.mark.parametrize("name", [n for n in RECIPES if "_rl_" in n and not n.endswith("_cpu")])
def test_every_phase_fits_and_engines_fill_the_gpus(name):
    recipe = get_recipe(name)
    request = rl_request(recipe)
    plan_memory(request)
    engines = request.engines
    assert engines.replicas * engines.gpus == recipe.layout.world_size
    answers = request.groups_in_play * request.group_size
    assert engines.replicas * engines.slots >= answers, "none waits for a slot"
    fewer = engines.replace(
        replicas=2 * engines.replicas,
        nodes_per_replica=max(1, engines.nodes_per_replica // 2),
        slots=engines.groups,
    )
    if engines.nodes_per_replica > 1:
        with pytest.raises(UserError, match="phase update"):
            plan_memory(request.replace(engines=fewer))


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["stage.engines.nodes_per_replica=2", "stage.engines.replicas=16"], "phase update: 101.7"),
        (["stage.engines.slots=4096"], r"take engines\.slots=1152 or fewer"),
        (["stage.engines.replicas=4"], "4 replicas of 32 GPUs on the trainer's 256"),
        (["stage.median_tokens=0"], "1 token or more"),
        (["stage.engines.backend=trt"], "local, vllm, sglang"),
        (["stage.engine.tp=2"], r"did you mean 'stage\.engines\.tp'"),
        (["stage.mini_batches=3"], "a number that divides them"),
        (["layout.optimizer_offload=0", "layout.activation_offload=0"], "GB a GPU too much"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_the_way_out(assignments, words):
    with pytest.raises(UserError, match=words):
        apply(get_recipe(K2), assignments).program_flags("runs/x")


def test_what_does_not_fit_is_shown_when_forced(capsys):
    argv = ["launch", K2, "--dry-run", "--force", "--set", "stage.engines.slots=4096"]
    assert main(argv) == 0
    assert "DOES NOT FIT (forced): phase rollout" in " ".join(capsys.readouterr().out.split())


def test_the_dry_run_shows_phases_timeline_and_script_and_draws(tmp_path, capsys):
    picture = tmp_path / "iteration.png"
    assert main(["launch", K2, "--dry-run", "--timeline", str(picture)]) == 0
    found = " ".join(capsys.readouterr().out.split())
    for words in (
        "128 prompts x 8 answers, 192 prompts in play; 4 optimizer steps; 100 iterations",
        "vllm: 8 replicas of 4 nodes (32 GPUs, attention over 1) on the trainer's nodes, block FP8",
        "GB while update 70.0 of 80: weights 9.0, engine weights 46.0",
        "if every answer were waited for",
        "RRRRRRRRRR",
        "#SBATCH --nodes=32",
        "megatron_k2.rl.cluster.supervisor",
    ):
        assert words in found, words
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_engines_of_their_own_change_what_is_said(capsys):
    argv = ["launch", K2, "--dry-run", "--set", "stage.engines.is_colocated=false"]
    assert main(argv) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "on nodes of their own" in found
    assert "states to host" not in found
    assert "engines wait while the trainer trains" in found
