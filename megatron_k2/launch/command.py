"""A recipe as a shell script of nothing but Megatron's flags and ours."""

from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.slurm import wrapped

TEMPLATE = """\
#!/usr/bin/env bash
# {name}: every flag, nothing looked up at run time.
# Written by: megatron-k2 launch {name} --print-args
# Start it on every node with torchrun's own arguments (--nnodes, --node-rank, --rdzv-endpoint, …)
# in TORCHRUN; further flags of Megatron may follow and win.
set -euo pipefail
cd "$(dirname "$0")/.."

flags=(
  {flags}
)
exec torchrun ${{TORCHRUN:---nproc-per-node {ranks}}} {script} "${{flags[@]}}" "$@"
"""


def render_command(recipe: Recipe, save: str, start_from: str | None = None) -> str:
    """A bash script that starts the recipe by torchrun; ``"$@"`` adds flags, which win."""
    return TEMPLATE.format(
        name=recipe.name,
        flags=wrapped(recipe.to_megatron_args(save, start_from)),
        script=recipe.stage.script,
        ranks=min(8, recipe.layout.world_size),
    )
