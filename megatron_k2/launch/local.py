"""A CPU twin run on this machine, by the program of ``megatron-k2 pretrain``, ``sft`` or ``rl``."""

from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.host.torchrun import launch
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.table import resolved
from megatron_k2.lock.directory import hold
from megatron_k2.run.flags import read_flags
from megatron_k2.run.iterations import has_tracker
from megatron_k2.run.record import RUN, write_record
from megatron_k2.run.rollback import read_rollbacks

RECIPE_RECORD = "recipe.json"


def write_recipe_record(
    recipe: Recipe, save: str, start_from: str | None, changed: list[str]
) -> Path:
    """``recipe.json`` beside the run: every value, the flags, the versions, the commit."""
    record = {
        "recipe": recipe.name,
        "preset": recipe.preset.name,
        "gpu": recipe.layout.gpu.name,
        "set": changed,
        "starts_from": start_from,
        "values": resolved(recipe),
        "sources": dict(recipe.sources),
        "differences": recipe.differences,
        "flags": recipe.to_megatron_args(save, start_from),
    }
    path = Path(save) / RECIPE_RECORD
    write_record(path, record)
    return path


def check_fits_here(recipe: Recipe) -> None:
    """Refuse to start a recipe of a cluster on this machine.

    Raises:
        UserError: naming its twin.
    """
    if not recipe.is_cpu:
        phase = recipe.phase.name.replace("-", "_")
        raise UserError(
            f"{recipe.name} needs {recipe.layout.world_size} GPUs: --executor slurm; its twin "
            f"for this machine is {recipe.name.split('_' + phase)[0]}_{phase}_cpu"
        )


def check_start(recipe: Recipe, save: str, start_from: str | None) -> None:
    """Refuse a run that starts from a checkpoint which is not there.

    Raises:
        UserError: naming the recipe that leaves it.
    """
    if start_from is None and recipe.layout.lora_rank and not has_tracker(Path(save)):
        raise UserError(
            f"{recipe.name} trains adapters over weights that it does not have: give --start-from "
            "DIR, a run's or what 'megatron-k2 convert import' wrote"
        )
    if start_from is None or any(has_tracker(Path(d)) for d in (save, start_from)):
        return
    first = f"run {recipe.previous} first, or " if recipe.previous else ""
    raise UserError(f"{start_from} has no checkpoint to start from; {first}--start-from DIR")


def run_local(recipe: Recipe, save: str, start_from: str | None, changed: list[str]) -> int:
    """Train ``recipe`` here and wait, again after each rollback; returns the exit code.

    Raises:
        UserError: for a recipe of a cluster, or flags that cannot run.
    """
    check_fits_here(recipe)
    check_start(recipe, save, start_from)
    full = read_flags(recipe.to_megatron_args(save, start_from))
    recipe.stage.program.check(full, recipe.layout.world_size)
    flags = recipe.program_flags(save, start_from)
    module, world_size = recipe.stage.module, recipe.layout.world_size
    with hold(Path(save), RUN) as held, held.handed_over():
        write_recipe_record(recipe, save, start_from, changed)
        while True:
            before = len(read_rollbacks(Path(save)))
            code = launch(module, flags, world_size)
            if code or len(read_rollbacks(Path(save))) == before:
                return code
