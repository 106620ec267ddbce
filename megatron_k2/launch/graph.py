"""A chain of recipes as one launch: each starts from the checkpoint of the one before it.

Every command is the same each time: phases that are done are passed over, the one that stopped goes
on from its last checkpoint. On Slurm all jobs are queued at once, each to start when the one before
it has ended well; a job that queues itself again has not ended yet.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_k2.launch.local import run_local, write_record
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.slurm import Cluster, render, submit
from megatron_k2.training.metrics import METRICS_FILE, read_records
from megatron_k2.training.preflight import TRACKER


def steps_saved(save: Path) -> int:
    """Step of the last whole checkpoint of a run, 0 without one."""
    try:
        return int((save / TRACKER).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def places(recipes: Sequence[Recipe], root: Path) -> list[tuple[Recipe, str, str | None]]:
    """(recipe, its directory, where it starts from) of every phase, in order."""
    saves = [str(root / recipe.name) for recipe in recipes]
    return list(zip(recipes, saves, [None, *saves[:-1]], strict=True))


def run_chain(
    recipes: Sequence[Recipe],
    root: Path,
    changed: list[str],
    run: Callable[[Recipe, str, str | None, list[str]], int] = run_local,
) -> int:
    """Run every phase here, in order; returns the exit code of the first that failed, or 0."""
    for number, (recipe, save, start_from) in enumerate(places(recipes, root), 1):
        heading = f"phase {number} of {len(recipes)}: {recipe.name}"
        if steps_saved(Path(save)) >= recipe.steps:
            print(f"{heading}: done before, {save}", flush=True)
            continue
        print(f"{heading}, {recipe.steps} steps, from {start_from or 'random weights'}", flush=True)
        if code := run(recipe, save, start_from, changed):
            return code
    return 0


def submit_chain(
    recipes: Sequence[Recipe], root: Path, changed: list[str], cluster: Cluster
) -> list[str]:
    """Queue every phase that is not done; returns the jobs' numbers.

    Raises:
        UserError: from ``render`` and ``submit``.
    """
    jobs: list[str] = []
    for recipe, save, start_from in places(recipes, root):
        if steps_saved(Path(save)) >= recipe.steps:
            continue
        script = render(recipe, cluster, save, start_from)
        jobs.append(submit(script, save, after=jobs[-1] if jobs else None))
        write_record(recipe, save, start_from, changed)
    return jobs


def chain_summary(recipes: Sequence[Recipe], root: Path) -> str:
    """What each phase did, a line each: steps, learning rate as planned and as seen, loss."""
    lines = [
        f"{'phase':<28} {'steps':>11} {'sequence':>8} {'rate at the end':>15} {'seen':>9} "
        f"{'loss':>15}"
    ]
    for recipe, save, _ in places(recipes, root):
        phase = recipe.phase
        tokens = recipe.steps * phase.tokens_per_step
        seen = read_records(Path(save) / METRICS_FILE)
        rate = f"{seen[-1].learning_rate:>9.3g}" if seen else f"{'-':>9}"
        loss = f"{seen[0].loss:.3f} -> {seen[-1].loss:.3f}" if seen else "-"
        lines.append(
            f"{recipe.name:<28} {steps_saved(Path(save)):>5}/{recipe.steps:<5} "
            f"{phase.seq_length:>8} {phase.lr_at(tokens):>15.3g} {rate} {loss:>15}"
        )
    return "\n".join(lines)
