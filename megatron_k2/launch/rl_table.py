"""What a launch's table says of reinforcement learning: engines, phases, an iteration."""

from megatron_k2.errors import UserError
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.rl_plan import is_planned, rl_request
from megatron_k2.launch.row import Row, source_of
from megatron_k2.launch.stage import ReinforcementLearning
from megatron_k2.planning.rl.fit import plan_memory
from megatron_k2.planning.rl.iteration import (
    RlPlan,
    mean_seconds,
    plan_iteration,
    tokens_of_judges,
)
from megatron_k2.planning.rl.memory import ON_GPU, Held
from megatron_k2.planning.rl.request import EngineLayout

BAR = 60
"""Characters of the timeline."""
MARKS = {"update": "u", "rollout": "R", "pi_old": "p", "train": "T"}
"""Parts of an iteration in the timeline; what moves is a dot."""


def rl_rows(recipe: Recipe) -> list[Row]:
    """Sampling, engines, and where they are planned their cost."""
    stage = recipe.stage
    assert isinstance(stage, ReinforcementLearning)
    found = [
        Row("learns from", stage.described(), source_of(recipe, "stage.group_size")),
        Row(
            "iteration",
            f"{stage.prompts(recipe.phase)} prompts x {stage.group_size} answers, "
            f"{stage.in_play(recipe.phase)} prompts in play; {stage.mini_batches} optimizer steps; "
            f"{recipe.phase.steps // stage.mini_batches} iterations",
            source_of(recipe, "stage.mini_batches"),
        ),
    ]
    if not isinstance(stage.engines, EngineLayout):
        return found
    found.append(
        Row("engines", engines_said(stage.engines), source_of(recipe, "stage.engines.replicas"))
    )
    return [*found, *_planned(plan_iteration(rl_request(recipe)))] if is_planned(recipe) else found


def engines_said(e: EngineLayout) -> str:
    """In one line."""
    where = "on the trainer's nodes" if e.is_colocated else "on nodes of their own"
    nodes = f"{e.nodes_per_replica} node{'s' if e.nodes_per_replica > 1 else ''}"
    gpus = f" ({e.gpus} GPUs, attention over {e.tp})" if e.gpus_per_node else ""
    form = "block FP8" if e.is_fp8 else "unquantised"
    return (
        f"{e.backend}: {e.replicas} replicas of {nodes}{gpus} {where}, {form}, "
        f"{e.slots} answers at once each"
    )


def _planned(plan: RlPlan) -> list[Row]:
    r, total = plan.request, plan.request.trainer.gpu.memory_gb
    lengths = r.lengths
    saved = 1 - plan.seconds / plan.waited_seconds
    return [
        Row(
            "lengths",
            f"prompts of {lengths.prompt:,} tokens; answers log-normal, median "
            f"{lengths.median:,.0f}, mean {lengths.mean:,.0f}, cut at {lengths.most:,}; "
            f"{r.tokens / 1e6:.1f}M tokens an iteration",
            "choice: not stated",
        ),
        *(
            Row(
                f"GB while {phase.phase}",
                f"{phase.total / 1e9:.1f} of {total:g}: {_parts_of(phase)}; on the host "
                f"{phase.on_host / 1e9:.1f}",
                "planner; sleeping parts are assumptions, not measured (planning/rl/memory.py)",
            )
            for phase in plan.memory.phases
        ),
        Row("fits", _verdict(plan)),
        Row(
            "an iteration",
            f"{plan.seconds:.0f} s, {plan.gpu_hours:.1f} GPU-hours: "
            + ", ".join(f"{p.name} {p.seconds:.1f}" for p in plan.parts if p.seconds),
            "planner: data sheet times assumed efficiencies, not measured",
        ),
        Row("timeline", timeline(plan)),
        Row(
            "partial rollouts",
            f"sampling {plan.rollout_seconds:.0f} s, {mean_seconds(plan.waited):.0f} s if every "
            f"answer were waited for: {saved:.0%} of an iteration saved; "
            f"{plan.rollouts[-1].cut_off} answers go on in the next; slots {plan.busy:.0%} busy",
            "simulated iterations",
        ),
        Row(
            "judges",
            f"{plan.judge_tokens / 1e6:.1f}M tokens an iteration ({r.judged:.0%} of groups; all of "
            f"them: {tokens_of_judges(r, 1.0) / 1e6:.1f}M), {plan.judge_seconds:.0f} s of all "
            "engines' reading",
            "every pair in both orders (rewards/rubric.py)",
        ),
        Row("overlaps", _overlaps(plan)),
    ]


def _parts_of(phase: Held) -> str:
    parts = ((name, getattr(phase, name) / 1e9) for name in ON_GPU)
    return ", ".join(f"{name.replace('_', ' ')} {gb:.1f}" for name, gb in parts if gb)


def _verdict(plan: RlPlan) -> str:
    try:
        plan_memory(plan.request)
    except UserError as error:
        return f"DOES NOT FIT (forced): {error}"
    return f"every phase; the cache holds {plan.memory.cache_tokens:,} tokens a group of GPUs"


def _overlaps(plan: RlPlan) -> str:
    apart = "" if plan.request.engines.is_colocated else "; engines wait while the trainer trains"
    return (
        "verifiers and judges with sampling; buckets of an update with their loading. Nothing of "
        f"training with sampling: the loop is on-policy{apart}"
    )


def timeline(plan: RlPlan) -> str:
    """An iteration as one line of characters."""
    line, at = "", 0.0
    for part in plan.parts:
        at += part.seconds
        line += MARKS.get(part.name, ".") * (round(BAR * at / plan.seconds) - len(line))
    legend = ", ".join(f"{mark} {name}" for name, mark in MARKS.items())
    return f"|{line}| {legend}, . states moved"
