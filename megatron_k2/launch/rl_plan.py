"""A recipe of reinforcement learning as the planner's request."""

from megatron_k2.errors import UserError
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.stage import ReinforcementLearning
from megatron_k2.planning.cost.memory import RESERVED_GB
from megatron_k2.planning.rl.fit import plan_memory
from megatron_k2.planning.rl.iteration import reserved_gb
from megatron_k2.planning.rl.request import EngineLayout, RlRequest


def has_engines(recipe: Recipe) -> bool:
    """Whether servers beside the trainer answer."""
    stage = recipe.stage
    return isinstance(stage, ReinforcementLearning) and isinstance(stage.engines, EngineLayout)


def is_planned(recipe: Recipe) -> bool:
    """Whether the planner has figures for it: servers, on GPUs."""
    return has_engines(recipe) and not recipe.is_cpu


def rl_request(recipe: Recipe) -> RlRequest:
    """What the planner is asked.

    Raises:
        UserError: a recipe without engines, or engines that are not on the GPUs they should be on.
    """
    stage = recipe.stage
    if not isinstance(stage, ReinforcementLearning) or not isinstance(stage.engines, EngineLayout):
        raise UserError(f"{recipe.name} has no engines to plan; take one of ..._rl_<N>gpu_<hw>")
    return RlRequest(
        trainer=recipe.layout,
        engines=stage.engines,
        lengths=stage.lengths(recipe.phase),
        group_size=stage.group_size,
        mini_batches=stage.mini_batches,
        groups_in_play=stage.in_play(recipe.phase),
        judged=stage.judged,
    )


def trainer_reserved_gb(recipe: Recipe) -> float:
    """What the trainer's memory leaves free on each GPU."""
    return reserved_gb(rl_request(recipe)) if is_planned(recipe) else RESERVED_GB


def check_phases(recipe: Recipe) -> None:
    """Refuse a recipe of which a phase does not fit.

    Raises:
        UserError: with the arithmetic, and what would fit.
    """
    if is_planned(recipe):
        plan_memory(rl_request(recipe))
