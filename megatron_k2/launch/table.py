"""What a run will be, in one table, before anything is submitted."""

from megatron_k2.launch.overrides import settable
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.rl_plan import is_planned
from megatron_k2.launch.rl_table import rl_rows
from megatron_k2.launch.row import Row, source_of
from megatron_k2.launch.stage import FineTuning, ReinforcementLearning
from megatron_k2.planning.estimate import Estimate, estimate

NEEDS_TE = (
    "--fp8-activation-storage --overlap-moe-expert-parallel-comm --delay-wgrad-compute "
    "--fine-grained-activation-offloading"
).split()
"""Flags of a plan that only Transformer Engine's modules understand."""


def rows(recipe: Recipe, changed: list[str], save: str, start_from: str | None) -> list[Row]:
    """The table.

    Args:
        recipe: with ``changed`` applied.
        changed: assignments of ``--set``.
        save: the run's directory.
        start_from: as in ``Recipe.program_flags``.
    """
    is_plain = not recipe.is_cpu and not is_planned(recipe)
    e = estimate(recipe.layout) if is_plain else None
    of_what = "iterations" if isinstance(recipe.stage, ReinforcementLearning) else "steps"
    found = [
        Row("model", recipe.preset.name, recipe.preset.source),
        *_layout(recipe),
        *_schedule(recipe),
        *(_planned(e, recipe) if e else []),
        Row(
            "checkpoints",
            f"every {recipe.checkpoint.interval:,} {of_what}, kept every "
            f"{recipe.checkpoint.retain_interval:,}, "
            + ("asynchronous" if recipe.checkpoint.asynchronous else "synchronous")
            + f"; {save}",
            source_of(recipe, "checkpoint.interval"),
        ),
        _start(recipe, start_from),
        Row("logs", f"{save}/logs, of Slurm {save}/slurm; tensorboard --logdir {save}"),
        Row("data", recipe.data.described(), source_of(recipe, "data.weights")),
        *_loss(recipe),
        Row(
            "bad loss",
            recipe.loss.described(),
            source_of(recipe, "loss.on_spike"),
        ),
    ]
    if recipe.profiler.tool != "off":
        found.append(Row("profiler", recipe.profiler.described(), source_of(recipe, "profiler")))
    flags = recipe.program_flags(save, start_from)
    if needed := [flag for flag in NEEDS_TE if flag in flags]:
        found.append(Row("needs TE", " ".join(needed), "no GPU run of these has been made here"))
    found += [Row("changed", text, "--set") for text in changed]
    return found + [Row("not as reported", text) for text in recipe.differences]


def _loss(recipe: Recipe) -> list[Row]:
    """Where it is not every token's."""
    said = recipe.stage.described()
    if isinstance(recipe.stage, FineTuning):
        return [Row("loss", said, source_of(recipe, "stage.average"))]
    if isinstance(recipe.stage, ReinforcementLearning):
        return rl_rows(recipe)
    return []


def _start(recipe: Recipe, start_from: str | None) -> Row:
    if start_from is None:
        nothing = "nothing yet: the frozen weights are --start-from's"
        return Row("starts from", nothing if recipe.layout.lora_rank else "random weights")
    with_what = "weights and optimizer" if recipe.keeps_optimizer else "weights, empty momentum"
    if recipe.layout.lora_rank:
        with_what = f"frozen weights under adapters of rank {recipe.layout.lora_rank}"
    return Row("starts from", f"{start_from}: {with_what}", source_of(recipe, "keeps_optimizer"))


def _layout(recipe: Recipe) -> list[Row]:
    r = recipe.layout
    if recipe.is_cpu:
        ranks = "one rank" if r.world_size == 1 else f"{r.world_size} ranks"
        return [Row("layout", f"{ranks}, CPU, fp32", source_of(recipe, "layout"))]
    return [
        Row(
            "GPUs",
            f"{r.world_size} x {r.gpu.name}, {r.gpu.memory_gb:g} GB",
            source_of(recipe, "layout.world_size"),
        ),
        Row(
            "layout",
            f"TP {r.tp}, PP {r.pp}, VPP {r.vpp}, EP {r.ep}, CP {r.cp}, DP {r.data_parallel}; "
            f"{recipe.precision}, ZeRO-1",
            source_of(recipe, "layout.pp"),
        ),
        Row("experts' tokens", recipe.dispatch.described(), source_of(recipe, "dispatch")),
        Row(
            "memory",
            f"recompute {', '.join(sorted(r.recompute)) or 'nothing'}; FP8 storage "
            f"{'on' if r.fp8_storage else 'off'}; on the host: {r.activation_offload:.0%} of "
            f"activations, {r.optimizer_offload:.0%} of optimizer states",
            source_of(recipe, "layout.activation_offload"),
        ),
    ]


def _schedule(recipe: Recipe) -> list[Row]:
    phase = recipe.phase
    rates = " -> ".join(f"{rate:.3g}" for rate in (phase.lr_at(0), phase.lr, phase.min_lr))
    return [
        *_batch(recipe),
        Row(
            "learning rate",
            f"{rates}, {phase.shape}"
            + (f", warm-up {phase.warmup_tokens:,} tokens" if phase.warmup_tokens else "")
            + (f", cosine over the last {phase.decay_tokens:,}" if phase.decay_tokens else "")
            + ("; YaRN" if phase.has_yarn else ""),
            phase.source,
        ),
    ]


def _batch(recipe: Recipe) -> list[Row]:
    phase, source = recipe.phase, source_of(recipe, "phase")
    if isinstance(recipe.stage, ReinforcementLearning):
        said = (
            f"{phase.sequences_per_step:,} answers a step, packed in rows of {phase.seq_length:,}"
        )
        return [Row("batch", f"{said}; {recipe.steps:,} steps", source)]
    return [
        Row(
            "batch",
            f"{phase.sequences_per_step:,} x {phase.seq_length:,} = {phase.tokens_per_step:,} "
            f"tokens a step, {recipe.layout.num_microbatches} micro-batches of "
            f"{recipe.layout.micro_batch_size}",
            source,
        ),
        Row("tokens", f"{phase.tokens:,} in {recipe.steps:,} steps"),
    ]


def _planned(e: Estimate, recipe: Recipe) -> list[Row]:
    tokens, fullest = recipe.phase.tokens, e.memory[e.fullest].total / 1e9
    return [
        Row(
            "fullest GPU",
            f"{fullest:.1f} of {e.request.gpu.memory_gb:g} GB"
            + ("" if e.fits else ": DOES NOT FIT (forced)"),
            "planner: megatron-k2 plan",
        ),
        Row(
            "time",
            f"{e.step_seconds:.1f} s a step, {e.tokens_per_second:,.0f} tokens/s, MFU {e.mfu:.1%}; "
            f"{e.days(tokens):.1f} days, {e.gpu_hours(tokens):,.0f} GPU-hours",
            "planner: data sheet times assumed efficiencies, not measured",
        ),
    ]


def shown(table: list[Row], width: int = 110) -> str:
    """The table as text, wrapped at ``width`` columns."""
    from megatron_k2.terminal import as_text, pairs

    lines = ((row.label, row.value + (f"  [{row.source}]" if row.source else "")) for row in table)
    return as_text(pairs(lines, indent=0), width=width)


def resolved(recipe: Recipe) -> dict[str, object]:
    """Every settable value by its dotted key, as JSON holds it."""
    return {
        key: sorted(value) if isinstance(value, frozenset) else value
        for key, value in settable(recipe).items()
    }
