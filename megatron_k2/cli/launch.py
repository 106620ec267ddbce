"""``megatron-k2 launch``: a recipe shown, run here, or given to Slurm."""

import argparse
from typing import TYPE_CHECKING

from megatron_k2.cli.launch_jobs import ACTIONS

if TYPE_CHECKING:
    from megatron_k2.launch.recipe import Recipe
    from megatron_k2.launch.slurm import Cluster

CLUSTER_FLAGS = ("account", "partition", "container", "time")


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
    parser.add_argument("--keys", action="store_true", help="every key of --set, value and source")
    parser.add_argument("--save", metavar="DIR", help="of the run (default: runs/RECIPE)")
    parser.add_argument(
        "--start-from", metavar="DIR", help="weights (default: the previous phase's runs/RECIPE)"
    )
    parser.add_argument("--force", action="store_true", help="even where it does not fit")
    parser.add_argument("--dry-run", action="store_true", help="table and script, nothing is run")
    parser.add_argument("--print-args", action="store_true", help="a pure Megatron command line")
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

    from megatron_k2.launch.slurm import Cluster, read_profile

    profile = read_profile(Path(arguments.profile)) if arguments.profile else Cluster()
    typed = {name: value for name in CLUSTER_FLAGS if (value := getattr(arguments, name))}
    if arguments.mounts:
        typed["mounts"] = tuple(arguments.mounts.split(","))
    return replace(profile, **typed)


def _keys(recipe: "Recipe") -> str:
    from megatron_k2.launch.table import Row, resolved, shown, source_of

    return shown([Row(key, str(v), source_of(recipe, key)) for key, v in resolved(recipe).items()])


def main(argv: list[str]) -> int:
    """Run the verb."""
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
    return _chain(recipes, arguments) if len(recipes) > 1 else _one(recipes[0], arguments)


def _one(recipe: "Recipe", arguments: argparse.Namespace) -> int:
    if arguments.keys:
        print(_keys(recipe))
        return 0
    save = arguments.save or f"runs/{recipe.name}"
    start_from = arguments.start_from
    if start_from is None and recipe.previous:
        start_from = f"runs/{recipe.previous}"
    if arguments.print_args:
        from megatron_k2.launch.command import render_command

        print(render_command(recipe, save, start_from), end="")
        return 0
    return _launch(recipe, save, start_from, arguments)


def _chain(recipes: list["Recipe"], arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from megatron_k2.errors import UserError
    from megatron_k2.launch.graph import chain_summary, places, run_chain, submit_chain
    from megatron_k2.launch.table import rows, shown

    if arguments.start_from or arguments.keys or arguments.print_args or arguments.nodes:
        raise UserError(
            f"{arguments.recipe} is {len(recipes)} runs: --keys, --print-args, --nodes and "
            f"--start-from are one run's, for example {recipes[0].name}'s"
        )
    root = Path(arguments.save or "runs")
    for recipe, save, start_from in places(recipes, root):
        table = shown(rows(recipe, arguments.set, save, start_from))
        print(f"{recipe.name}\n\n{table}\n", flush=True)
    if arguments.dry_run:
        return 0
    if arguments.executor == "slurm":
        jobs = submit_chain(recipes, root, arguments.set, _cluster(arguments))
        print(f"submitted {' -> '.join(jobs) or 'nothing: every phase is done'}")
        return 0
    code = run_chain(recipes, root, arguments.set)
    print(f"\n{chain_summary(recipes, root)}")
    return code


def _launch(
    recipe: "Recipe", save: str, start_from: str | None, arguments: argparse.Namespace
) -> int:
    from megatron_k2.launch.table import rows, shown

    is_slurm = arguments.executor == "slurm"
    script = ""
    if is_slurm:
        from megatron_k2.launch.slurm import render

        script = render(recipe, _cluster(arguments), save, start_from, arguments.nodes)
    print(f"{recipe.name}\n\n{shown(rows(recipe, arguments.set, save, start_from))}\n", flush=True)
    if arguments.dry_run:
        print(script, end="")
        return 0
    from megatron_k2.launch.local import run_local, write_record

    if not is_slurm:
        return run_local(recipe, save, start_from, arguments.set)
    from megatron_k2.launch.slurm import submit

    job = submit(script, save)
    write_record(recipe, save, start_from, arguments.set)
    print(f"submitted {job}; squeue --job {job}; log {save}/slurm/{job}.log")
    return 0
