"""The sbatch script of any recipe, and the nodes that it asks for."""

from megatron_k2.launch.cluster import Cluster
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.rl_plan import has_engines
from megatron_k2.launch.rl_slurm import render_rl
from megatron_k2.launch.slurm import render


def render_script(
    recipe: Recipe,
    save: str,
    start_from: str | None,
    cluster: Cluster,
    nodes: int | None = None,
) -> str:
    """One program on every rank, or several that meet.

    Raises:
        UserError: ``nodes`` is another number than the recipe's.
    """
    one = render_rl if has_engines(recipe) else render
    return one(recipe, save, start_from, cluster, nodes)
