"""Which engines a recipe has, and the file of them that supervisors read."""

from collections.abc import Mapping
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.rl_plan import is_planned, rl_request
from megatron_k2.launch.slurm import num_nodes
from megatron_k2.launch.stage import ReinforcementLearning
from megatron_k2.launch.task_data import TaskData
from megatron_k2.planning.rl.memory import held
from megatron_k2.planning.rl.request import EngineLayout

SHARED_MEMORY = "/dev/shm"
WEIGHTS = "rl/weights"
"""In a run's directory: what is on its way to engines of other nodes."""


def engines_of(recipe: Recipe) -> EngineLayout:
    """Of a recipe that has some.

    Raises:
        UserError: it has none.
    """
    if isinstance(recipe.stage, ReinforcementLearning):
        engines = recipe.stage.engines
        if isinstance(engines, EngineLayout):
            return engines
    raise UserError(f"{recipe.name} has no engines beside the trainer")


def engines_file(recipe: Recipe, save: str) -> dict[str, Any]:
    """What ``rl/cluster/engines.py`` reads: which engines there are, and their back-end's options.

    Weights come to engines of other nodes over the disk that the run is on.

    Args:
        recipe: of the run.
        save: its directory.

    Raises:
        UserError: a recipe without engines, or of other data.
    """
    e, data = engines_of(recipe), recipe.data
    if not isinstance(data, TaskData):
        raise UserError(f"{recipe.name} reads no task sets")
    if data.model:
        model: dict[str, Any] = {"directory": f"{data.root}/{data.model}"}
    else:
        model = {"preset": recipe.preset.name, "max_position_embeddings": recipe.phase.seq_length}
        model |= {} if recipe.phase.has_yarn else {"yarn": None}
    return {
        "backend": e.backend,
        "replicas": e.replicas,
        "nodes_per_replica": e.nodes_per_replica,
        "gpus_per_node": e.gpus_per_node,
        "colocated": e.is_colocated,
        "after": "trainer" if e.is_colocated else "",
        "model": model | {"tokenizer": f"{data.root}/{data.tokenizer}"},
        "options": _options(recipe, e),
        "weights_directory": SHARED_MEMORY if sum(rl_nodes(recipe)) == 1 else f"{save}/{WEIGHTS}",
    }


def _options(recipe: Recipe, e: EngineLayout) -> Mapping[str, object]:
    """Of the back-end: how many answers, how long, how much of a GPU."""
    length, each = recipe.phase.seq_length, e.slots // e.groups
    part = f"{held(rl_request(recipe)).memory_part:.2f}" if is_planned(recipe) else "0"
    if e.backend == "vllm":
        return {
            "max_model_len": length,
            "max_num_seqs": each,
            "tensor_parallel_size": e.tp,
            "gpu_memory_utilization": float(part),
            "returns_routed_experts": True,
        }
    if e.backend == "sglang":
        return {
            "context_length": length,
            "max_running_requests": e.slots,
            "mem_fraction_static": float(part),
        }
    invariant = "--batch-invariant" in recipe.extra_flags
    return {
        "num_slots": e.slots,
        "max_length": length,
        "dtype": "bfloat16" if recipe.precision == "bf16" else "float32",
        "batch_invariant": invariant,
    }


def rl_nodes(recipe: Recipe, given: int | None = None) -> tuple[int, int]:
    """(of the trainer, of engines beside them); both are one allocation.

    Raises:
        UserError: ``given`` is another number than both together.
    """
    e, trainer = engines_of(recipe), num_nodes(recipe)
    beside = 0 if e.is_colocated or recipe.is_cpu else e.nodes
    if given is not None and given != trainer + beside:
        raise UserError(
            f"--nodes {given}: {recipe.name} is {trainer} nodes of the trainer and {beside} of "
            f"engines, {trainer + beside} in all; change it by --set layout.world_size or "
            "stage.engines.replicas"
        )
    return trainer, beside
