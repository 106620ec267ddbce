"""``megatron-k2 launch``: a recipe shown, run here, or given to Slurm."""

import argparse
from typing import TYPE_CHECKING

from megatron_k2.cli.launch_jobs import ACTIONS

if TYPE_CHECKING:
    from megatron_k2.launch.cluster import Cluster
    from megatron_k2.launch.graph import PhaseRun
    from megatron_k2.launch.recipe import Recipe

CLUSTER_FLAGS = ("account", "partition", "container", "time")
ONLY_SLURM = ("profile", "nodes", "mounts", *CLUSTER_FLAGS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-k2 launch",
        description="Run a recipe. The same command goes on where the last one stopped.",
        epilog="Once it is launched: megatron-k2 launch status|logs|cancel RECIPE",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="see --list")
    parser.add_argument("--list", action="store_true", help="names of all recipes")
    parser.add_argument("--executor", choices=["local", "slurm"], default="slurm")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value"
    )
    parser.add_argument(
        "--nemo-run", action="store_true", help="through NeMo-Run instead of torchrun or sbatch"
    )
    parser.add_argument("--detach", action="store_true", help="NeMo-Run: return once submitted")
    parser.add_argument("--keys", action="store_true", help="every key of --set, value and source")
    parser.add_argument("--save", metavar="DIR", help="of the run (default: runs/RECIPE)")
    parser.add_argument(
        "--start-from", metavar="DIR", help="weights (default: the previous phase's runs/RECIPE)"
    )
    parser.add_argument("--force", action="store_true", help="even where it does not fit")
    parser.add_argument("--dry-run", action="store_true", help="table and script, nothing is run")
    parser.add_argument(
        "--timeline", metavar="FILE.png", help="draw an iteration of reinforcement learning"
    )
    parser.add_argument("--print-args", action="store_true", help="a pure Megatron command line")
    parser.add_argument(
        "--nemo-rl-yaml", action="store_true", help="overrides of NeMo-RL v0.7.0's keys; untried"
    )
    cluster = parser.add_argument_group("slurm (over the profile's)")
    cluster.add_argument("--profile", metavar="FILE.yaml", help="a cluster's account, image, …")
    cluster.add_argument("--nodes", type=int, help="checked against the recipe's")
    cluster.add_argument("--account")
    cluster.add_argument("--partition")
    cluster.add_argument("--container", metavar="IMAGE", help="for pyxis")
    cluster.add_argument("--mounts", metavar="FROM:TO,…")
    cluster.add_argument("--time", metavar="[D-]HH:MM:SS")
    return parser


def _cluster(arguments: argparse.Namespace) -> "Cluster":
    from dataclasses import replace
    from pathlib import Path

    from megatron_k2.launch.cluster import Cluster, read_profile

    profile = read_profile(Path(arguments.profile)) if arguments.profile else Cluster()
    typed = {name: value for name in CLUSTER_FLAGS if (value := getattr(arguments, name))}
    if arguments.mounts:
        typed["mounts"] = tuple(arguments.mounts.split(","))
    return replace(profile, **typed)


def _keys(recipe: "Recipe") -> str:
    from megatron_k2.launch.row import Row, source_of
    from megatron_k2.launch.table import resolved, shown

    return shown([Row(key, str(v), source_of(recipe, key)) for key, v in resolved(recipe).items()])


def main(argv: list[str]) -> int:
    """``megatron-k2 launch``; returns the exit code."""
    if argv and argv[0] in ACTIONS:
        from megatron_k2.cli.launch_jobs import main as of_launched

        return of_launched(argv)
    parser = _parser()
    arguments = parser.parse_args(argv)
    from megatron_k2.errors import UserError
    from megatron_k2.recipes import CHAINS, RECIPES, get_chain

    if arguments.list:
        print("\n".join([*RECIPES, *CHAINS]))
        return 0
    if arguments.recipe is None:
        raise UserError("which recipe? --list names them")
    from megatron_k2.launch.overrides import apply

    recipes = [
        apply(one, arguments.set, force=arguments.force) for one in get_chain(arguments.recipe)
    ]
    runs = _chain(recipes, arguments) if len(recipes) > 1 else [_single(recipes[0], arguments)]
    if arguments.keys:
        print(_keys(recipes[0]))
    elif arguments.print_args:
        from megatron_k2.launch.command import render_command

        print(render_command(*runs[0]), end="")
    elif arguments.nemo_rl_yaml:
        from megatron_k2.launch.nemo_rl import nemo_rl_yaml

        print(nemo_rl_yaml(*runs[0][:2]), end="")
    else:
        return _launch(runs, arguments)
    return 0


def _single(recipe: "Recipe", arguments: argparse.Namespace) -> "PhaseRun":
    from megatron_k2.errors import UserError

    start_from = arguments.start_from
    if start_from is None and recipe.previous:
        start_from = f"runs/{recipe.previous}"
    if start_from is None and recipe.imported:
        raise UserError(
            f"{recipe.name} continues from {recipe.imported}: megatron-k2 convert import HF_DIR "
            "DIR, then --start-from DIR"
        )
    return recipe, arguments.save or f"runs/{recipe.name}", start_from


def _chain(recipes: list["Recipe"], arguments: argparse.Namespace) -> list["PhaseRun"]:
    from pathlib import Path

    from megatron_k2.errors import UserError
    from megatron_k2.launch.graph import places

    if arguments.start_from or arguments.keys or arguments.print_args or arguments.nodes:
        raise UserError(
            f"{arguments.recipe} is {len(recipes)} runs: --keys, --print-args, --nodes and "
            f"--start-from are one run's, for example {recipes[0].name}'s"
        )
    return places(recipes, Path(arguments.save or "runs"))


def _check_executor(arguments: argparse.Namespace) -> None:
    from megatron_k2.errors import UserError

    given = [name for name in ONLY_SLURM if getattr(arguments, name) is not None]
    if arguments.executor == "local" and given:
        raise UserError(
            f"--{given[0]} with --executor local: only Slurm asks for it; drop it, or use "
            "--executor slurm"
        )
    if arguments.detach and not arguments.nemo_run:
        raise UserError(
            "--detach without --nemo-run: sbatch returns at once anyway, and --executor local "
            "waits; drop it, or add --nemo-run"
        )


def _launch(runs: list["PhaseRun"], arguments: argparse.Namespace) -> int:
    from megatron_k2.launch.script import render_script
    from megatron_k2.launch.table import rows, shown

    _check_executor(arguments)
    cluster = _cluster(arguments) if arguments.executor == "slurm" else None
    scripts = [render_script(*run, cluster, arguments.nodes) for run in runs] if cluster else []
    for recipe, save, start_from in runs:
        table = shown(rows(recipe, arguments.set, save, start_from))
        print(f"{recipe.name}\n\n{table}\n", flush=True)
    if arguments.timeline:
        _draw_timeline(runs, arguments.timeline)
    if arguments.nemo_run:
        return _through_nemo_run(runs, arguments, cluster)
    if arguments.dry_run:
        print("\n".join(scripts), end="")
        return 0
    if cluster:
        return _submit(runs, scripts, arguments)
    from megatron_k2.launch.graph import chain_summary, run_chain

    code = run_chain(runs, arguments.set)
    if len(runs) > 1:
        print(f"\n{chain_summary(runs)}")
    return code


def _draw_timeline(runs: list["PhaseRun"], path: str) -> None:
    from pathlib import Path

    from megatron_k2.files import write_atomically
    from megatron_k2.launch.rl_plan import rl_request
    from megatron_k2.planning.rl.figure import draw_iteration
    from megatron_k2.planning.rl.iteration import plan_iteration

    plan = plan_iteration(rl_request(runs[-1][0]))
    write_atomically(Path(path), draw_iteration(plan))
    print(f"{path}: an iteration, drawn\n", flush=True)


def _through_nemo_run(
    runs: list["PhaseRun"], arguments: argparse.Namespace, cluster: "Cluster | None"
) -> int:
    from megatron_k2.nemo.tasks import run_experiment, show_experiment

    if arguments.dry_run:
        show_experiment(runs, arguments.set, cluster, force=arguments.force)
        return 0
    waits = not arguments.detach
    name = run_experiment(runs, arguments.set, cluster, waits=waits, force=arguments.force)
    print(f"experiment {name}; nemo experiment status {name}")
    return 0


def _submit(runs: list["PhaseRun"], scripts: list[str], arguments: argparse.Namespace) -> int:
    from megatron_k2.launch.graph import submit_chain

    jobs = submit_chain(runs, scripts, arguments.set)
    print(f"submitted {' -> '.join(jobs) or 'nothing: done before'}")
    place = f" --save {arguments.save}" if arguments.save else ""
    print(f"megatron-k2 launch status|logs|cancel {arguments.recipe}{place}")
    return 0
