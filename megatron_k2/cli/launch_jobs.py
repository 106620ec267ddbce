"""``megatron-k2 launch status|logs|cancel``: a launched recipe, or chain of recipes, on Slurm."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_k2.launch.recipe import Recipe

ACTIONS = ("status", "logs", "cancel")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-k2 launch", description=__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--save", metavar="DIR", help="as it was launched with")
    parser.add_argument("--follow", action="store_true", help="logs: go on until the job ends")
    return parser


def main(argv: list[str]) -> int:
    """``megatron-k2 launch status|logs|cancel``; returns the exit code."""
    arguments = _parser().parse_args(argv)
    from megatron_k2.recipes import get_chain

    recipes = get_chain(arguments.recipe)
    if len(recipes) == 1:
        runs = [(recipes[0], arguments.save or f"runs/{recipes[0].name}")]
    else:
        runs = [(r, str(Path(arguments.save or "runs") / r.name)) for r in recipes]
    for recipe, save in runs:
        if arguments.action == "status":
            _status(recipe, save)
        elif arguments.action == "logs":
            _logs(save, follows=arguments.follow)
        else:
            _cancel(recipe, save)
    return 0


def _status(recipe: "Recipe", save: str) -> None:
    from megatron_k2.launch.jobs import jobs_of, log_path, states
    from megatron_k2.run.iterations import last_iteration
    from megatron_k2.run.metrics import METRICS_FILE, read_records

    if not Path(save).is_dir():
        print(f"{recipe.name}: not launched here, there is no {save}; --save DIR says where it is")
        return
    print(f"{recipe.name}: saved at step {last_iteration(Path(save)):,} of {recipe.steps:,}")
    if records := read_records(Path(save) / METRICS_FILE):
        last = records[-1]
        print(f"  step {last.iteration:,}, loss {last.loss:.4f}, max logit {last.max_logit:.1f}")
    jobs = jobs_of(save)
    known = states(jobs)
    for job in jobs:
        state = known.get(job.number)
        how = f"{state.name}, {state.elapsed}" if state else "not in the accounting"
        print(f"  job {job.number}, submitted {job.submitted}: {how}")
    if jobs:
        print(f"  log {log_path(save)}; tensorboard --logdir {save}")


def _logs(save: str, *, follows: bool) -> None:
    from megatron_k2.errors import UserError
    from megatron_k2.launch.jobs import follow, log_path

    if follows:
        for text in follow(save):
            sys.stdout.write(text)
            sys.stdout.flush()
        return
    path = log_path(save)
    if not path.is_file():
        raise UserError(f"{path}: the job has not started; --follow waits for it")
    sys.stdout.write(path.read_text(errors="replace"))


def _cancel(recipe: "Recipe", save: str) -> None:
    from megatron_k2.launch.jobs import cancel

    numbers = cancel(save)
    print(f"{recipe.name}: " + (f"cancelled {', '.join(numbers)}" if numbers else "nothing runs"))
