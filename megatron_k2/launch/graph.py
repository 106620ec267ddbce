"""A chain of recipes as one launch: each starts from the checkpoint of the one before it.

Every command is the same each time: phases that are done are passed over, the one that stopped goes
on from its last checkpoint. On Slurm all jobs are queued at once, each to start when the one before
it has ended well; a job that queues itself again has not ended yet.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_k2.launch.local import check_start, run_local, write_recipe_record
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.slurm import submit
from megatron_k2.run.iterations import last_iteration
from megatron_k2.run.metrics import METRICS_FILE, read_records

INTERRUPTED = 1
"""Exit code of a chain whose run ended well before its last step, as after a SIGTERM."""

type PhaseRun = tuple[Recipe, str, str | None]
"""A recipe, its directory, and the directory it starts from while its own has no checkpoint."""


def places(recipes: Sequence[Recipe], root: Path) -> list[PhaseRun]:
    """A run of every phase under ``root``, in order."""
    saves = [str(root / recipe.name) for recipe in recipes]
    return list(zip(recipes, saves, [None, *saves[:-1]], strict=True))


def is_done(run: PhaseRun) -> bool:
    """Whether its last step is in a checkpoint."""
    recipe, save, _ = run
    return last_iteration(Path(save)) >= recipe.steps


def run_chain(
    runs: Sequence[PhaseRun],
    changed: list[str],
    train: Callable[[Recipe, str, str | None, list[str]], int] = run_local,
) -> int:
    """Train every run here, in order; returns the exit code of the first that failed, or 0."""
    for number, run in enumerate(runs, 1):
        recipe, save, start_from = run
        heading = f"{number} of {len(runs)}: {recipe.name}"
        if is_done(run):
            print(f"{heading}: done before, {save}", flush=True)
            continue
        print(f"{heading}, {recipe.steps} steps, from {start_from or 'random weights'}", flush=True)
        if code := train(recipe, save, start_from, changed):
            return code
        if not is_done(run):
            print(f"{heading}: ended early; the same command goes on", flush=True)
            return INTERRUPTED
    return 0


def submit_chain(runs: Sequence[PhaseRun], scripts: Sequence[str], changed: list[str]) -> list[str]:
    """Queue every run that is not done, each after the one before it; returns the jobs' numbers.

    Args:
        runs: in order.
        scripts: of each, from ``slurm.render``.
        changed: assignments of ``--set``, for the record.

    Raises:
        UserError: without a checkpoint to start from, or from ``slurm.submit``.
    """
    jobs: list[str] = []
    for run, script in zip(runs, scripts, strict=True):
        if not is_done(run):
            recipe, save, start_from = run
            if not jobs:  # the others start from what these leave
                check_start(recipe, save, start_from)
            jobs.append(submit(script, save, after=jobs[-1] if jobs else None))
            write_recipe_record(recipe, save, start_from, changed)
    return jobs


def chain_summary(runs: Sequence[PhaseRun]) -> str:
    """A line for each run: steps, blend, learning rate as planned and seen, loss."""
    from megatron_k2.terminal import as_text, table

    found = table(
        *("phase", "steps", "sequence", "blend, %", "rate at the end", "seen", "loss"),
    )
    for recipe, save, _ in runs:
        phase = recipe.phase
        tokens = recipe.steps * phase.tokens_per_step
        seen = read_records(Path(save) / METRICS_FILE)
        found.add_row(
            recipe.name,
            f"{last_iteration(Path(save))}/{recipe.steps}",
            f"{phase.seq_length}",
            "/".join(f"{100 * part:.0f}" for _, part in recipe.data.parts) or "-",
            f"{phase.lr_at(tokens):.3g}",
            f"{seen[-1].learning_rate:.3g}" if seen else "-",
            f"{seen[0].loss:.3f} -> {seen[-1].loss:.3f}" if seen else "-",
        )
    return as_text(found)
