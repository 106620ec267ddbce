"""What NeMo-Run's command line finds: entry point ``k2`` of group ``nemo_run.cli``.

    nemo k2 train --factory kimi_k2_pretrain_cpu save=runs/x

Every recipe is a factory of ``train``; ``pretrain_recipe`` and ``finetune_recipe`` are called as
nemo-toolkit 2.7's recipes (``nemo.collections.llm.recipes``): directory, name, nodes, GPUs a node.
Neither imports nemo-toolkit; nor does MuonClip fit its optimizer modules, so the function behind
the partial is this package's, not ``llm.pretrain``.
"""

from typing import Any

import nemo_run as run

from megatron_k2.nemo.tasks import task, train_recipe
from megatron_k2.planning.gpus import GPUS_PER_NODE
from megatron_k2.recipes import RECIPES, get_recipe, kimi_k2

train = run.cli.entrypoint(name="train", namespace="k2")(train_recipe)


def _register(name: str) -> None:
    def build() -> run.Partial[Any]:
        previous = get_recipe(name).previous
        return task(name, f"runs/{name}", f"runs/{previous}" if previous else None)

    build.__name__ = name
    build.__doc__ = f"Recipe {name} into runs/{name}."
    run.cli.factory(build, target=train_recipe, name=name, namespace="k2")


for _name in RECIPES:
    _register(_name)


def pretrain_recipe(
    dir: str | None = None,
    name: str = "default",
    num_nodes: int = 128,
    num_gpus_per_node: int = GPUS_PER_NODE,
    phase: str = "pretrain",
    hardware: str = "h800",
) -> "run.Partial[Any]":
    """Kimi K2's pretraining as nemo-toolkit 2.7's recipes are called.

    Args:
        dir: where the run's directory goes (default: ``runs``).
        name: of the run's directory.
        num_nodes: nodes of eight GPUs.
        num_gpus_per_node: as there; eight.
        phase: a key of ``recipes.kimi_k2.PHASES``.
        hardware: of ``recipes.kimi_k2.HARDWARE``.

    Raises:
        UserError: for a size that no recipe has; the message names the nearest.
    """
    recipe = get_recipe(kimi_k2.name(phase, num_nodes * num_gpus_per_node, hardware))
    return task(recipe.name, f"{dir or 'runs'}/{name}", None)


def finetune_recipe(
    dir: str | None = None,
    resume_path: str | None = None,
    name: str = "default",
    num_nodes: int = 32,
    num_gpus_per_node: int = GPUS_PER_NODE,
    hardware: str = "h800",
) -> "run.Partial[Any]":
    """Kimi K2's fine-tuning as nemo-toolkit 2.7's recipes are called.

    Args:
        dir: where the run's directory goes (default: ``runs``).
        resume_path: the weights to start from, imported or another run's (default: the recipe's).
        name: of the run's directory.
        num_nodes: nodes of eight GPUs.
        num_gpus_per_node: as there; eight.
        hardware: of ``recipes.kimi_k2.HARDWARE``.

    Raises:
        UserError: for a size that no recipe has; the message names the nearest.
    """
    recipe = get_recipe(kimi_k2.name("sft", num_nodes * num_gpus_per_node, hardware))
    return task(recipe.name, f"{dir or 'runs'}/{name}", resume_path or f"runs/{recipe.previous}")
