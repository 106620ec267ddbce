"""What ``megatron-k2 plan`` prints: a run's memory and time, the search's ranking, JSON."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_k2.planning.estimate import Assumptions, Estimate
    from megatron_k2.planning.request import RunRequest
    from megatron_k2.planning.search import Found
    from megatron_k2.planning.update import WeightUpdate
    from megatron_k2.training.dry_run import BuiltRank

GB = 1e9


def facts(e: "Estimate", tokens: float) -> dict[str, Any]:
    """Everything printed, for JSON; bytes, seconds, elements."""
    from megatron_k2.planning.schedule.chunks import megatron_layout

    r = e.request
    return {
        "preset": r.preset.name,
        "gpu": r.gpu.name,
        "world_size": r.world_size,
        "layout": {
            **{name: getattr(r, name) for name in ("tp", "pp", "vpp", "ep", "cp")},
            "micro_batch_size": r.micro_batch_size,
            "micro_batches": r.num_microbatches,
            "pipeline_layout": megatron_layout(r.chunks()),
        },
        "seq_length": r.seq_length,
        "sequences_per_step": r.sequences_per_step,
        "recompute": sorted(r.recompute),
        "fp8_storage": r.fp8_storage,
        "activation_offload": r.activation_offload,
        "optimizer_offload": r.optimizer_offload,
        "fits": e.fits,
        "ranks": [
            {
                "parameters": m.parameters.total,
                "frozen": m.frozen,
                **{name: getattr(m, name) for name in MEMORY_COLUMNS},
                "optimizer_step": m.optimizer_step,
                "total": m.total,
            }
            for m in e.memory
        ],
        "step_seconds": e.step_seconds,
        "arithmetic_seconds": e.arithmetic_seconds,
        "expert_seconds": e.expert_seconds,
        "exposed_expert_seconds": e.exposed_expert_seconds,
        "bubble_seconds": e.bubble_seconds,
        "optimizer_seconds": e.optimizer_seconds,
        "newton_schulz_seconds": e.newton_schulz_seconds,
        "host_traffic_bytes": {
            "activations": e.host_traffic.activations,
            "optimizer": e.host_traffic.optimizer,
        },
        "optimizer_copy_seconds": e.optimizer_copy_seconds,
        "exposed_copy_seconds": e.exposed_copy_seconds,
        "tokens_per_second": e.tokens_per_second,
        "mfu": e.mfu,
        "tokens": tokens,
        "days": e.days(tokens),
        "gpu_hours": e.gpu_hours(tokens),
    }


MEMORY_COLUMNS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "optimizer_on_host": "(on host)",
    "activations": "activations",
    "activations_on_host": "(on host)",
    "reserved": "reserved",
}


def memory_table(e: "Estimate") -> "Table":
    """One row for pipeline ranks that need the same."""
    from megatron_k2.terminal import table

    headings = ("rank", "parameters", *MEMORY_COLUMNS.values(), "total")
    found = table(*headings, title="GB on a GPU of each pipeline rank", has_names=False)
    shown: list[tuple[list[int], list[str]]] = []
    for rank, m in enumerate(e.memory):
        cells = [f"{m.parameters.total:,}"]
        cells += [f"{getattr(m, name) / GB:.1f}" for name in MEMORY_COLUMNS]
        cells.append(f"{m.total / GB:.1f}")
        if shown and shown[-1][1] == cells:
            shown[-1][0].append(rank)
        else:
            shown.append(([rank], cells))
    for ranks, cells in shown:
        name = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        found.add_row(name, *cells, style=None if e.fits else "red")
    return found


def summary(e: "Estimate", tokens: float) -> str:
    """Memory and time in sentences, below the table of ranks."""
    r = e.request
    mean = sum(m.states for m in e.memory) / len(e.memory) / GB
    verdict = "fits" if e.fits else "DOES NOT FIT"
    return "\n".join(
        [
            f"states {mean:.1f} GB a GPU on average, {e.memory[e.fullest].states / GB:.1f} on the "
            f"fullest (rank {e.fullest}); on the host: {r.activation_offload:.0%} of activations, "
            f"{r.optimizer_offload:.0%} of optimizer states; {verdict} in {r.gpu.memory_gb:g} GB",
            "",
            f"step {e.step_seconds:.2f} s: arithmetic {e.arithmetic_seconds:.2f}, expert "
            f"all-to-all not hidden {e.exposed_expert_seconds:.2f} of {e.expert_seconds:.2f}, "
            f"bubble {e.bubble_seconds:.2f}, optimizer {e.optimizer_seconds:.2f} (Newton-Schulz "
            f"{e.newton_schulz_seconds:.3f})",
            *host_lines(e),
            f"{e.tokens_per_second:,.0f} tokens/s, MFU {e.mfu:.1%}; {tokens / 1e12:g}T tokens: "
            f"{e.days(tokens):.1f} days, {e.gpu_hours(tokens):,.0f} GPU-hours",
        ]
    )


def _updates(r: "RunRequest", a: "Assumptions") -> "dict[str, WeightUpdate]":
    """By the form in which engines hold the weights."""
    from megatron_k2.planning.update import weight_update

    return {
        name: weight_update(r.preset, r.gpu, r.world_size, a, is_fp8=is_fp8)
        for name, is_fp8 in (("block FP8", True), ("bf16", False))
    }


def update_line(r: "RunRequest", a: "Assumptions") -> str:
    """Seconds of new weights to engines on the same GPUs, as post-training needs them."""
    said = [
        f"{u.seconds:.1f} s in {name} ({u.num_bytes / GB:,.1f} GB to each, of which it reads "
        f"{u.share_bytes / GB:.1f} at start)"
        for name, u in _updates(r, a).items()
    ]
    return f"new weights to engines on these GPUs: {', '.join(said)}"


def update_facts(r: "RunRequest", a: "Assumptions") -> dict[str, dict[str, float]]:
    """The same for JSON; bytes and seconds."""
    return {
        name.lower().replace(" ", "_"): {**dataclasses.asdict(u), "seconds": u.seconds}
        for name, u in _updates(r, a).items()
    }


def assumed_line(r: "RunRequest", a: "Assumptions") -> str:
    """The efficiencies, where none was measured."""
    return (
        f"assumed: GEMM {a.gemm:.0%}, grouped {a.grouped:.0%}, attention {a.attention:.0%} of "
        f"{r.gpu.bf16_tflops:g} TFLOP/s, network {a.network:.0%}, elementwise "
        f"+{a.elementwise:.0%}, HBM {a.hbm:.0%}; {a.reserved_gb:g} GB reserved"
    )


def host_lines(e: "Estimate") -> list[str]:
    """What goes over PCIe, where anything does."""
    once, parts = e.host_traffic, []
    if once.activations:
        parts.append(f"{once.activations / GB:,.0f} GB of activations, beside the arithmetic")
    if once.optimizer:
        parts.append(
            f"{once.optimizer / GB:.1f} GB of optimizer states in {e.optimizer_copy_seconds:.2f} s "
            f"({e.exposed_copy_seconds:.2f} not hidden)"
        )
    return [f"to host memory and back, a GPU and step: {'; '.join(parts)}"] if parts else []


def built_line(built: "BuiltRank", r: "RunRequest") -> str:
    """A distinct rank of the dry run, and whether it fits."""
    which = f"{built.ranks[0]}-{built.ranks[-1]}" if len(built.ranks) > 1 else f"{built.ranks[0]}"
    optimizer, memory = built.optimizer, r.gpu.memory_gb * GB
    over = optimizer.total_bytes - memory
    layers = "+".join(map(str, built.layers))
    verdict = f"DOES NOT FIT, {over / GB:.1f} GB over" if over > 0 else "fits"
    return (
        f"  rank {which}: {layers} layers, {built.num_modules:,} modules, "
        f"{built.parameters.total:,} parameters as planned ({built.seconds:.1f} s)\n"
        f"    MuonClip: {built.num_matrices:,} matrices, homes over {optimizer.num_ranks} ranks, "
        f"busiest {optimizer.imbalance:.3f} of the floor; {built.parameters.adamw:,} parameters "
        f"for AdamW\n"
        f"    fullest GPU: {optimizer.total_bytes / GB:.1f} GB, of it optimizer states "
        f"{optimizer.on_device / GB:.1f} ({optimizer.on_host / GB:.1f} on the host): {verdict}"
    )


def title(r: "RunRequest") -> str:
    """Model, GPUs, parallel sizes and batch of the plan, in one line."""
    return (
        f"{r.preset.name} on {r.world_size} x {r.gpu.name}: TP {r.tp}, PP {r.pp}, VPP {r.vpp}, EP "
        f"{r.ep}, CP {r.cp}, DP {r.data_parallel}; {r.sequences_per_step} x {r.seq_length} tokens "
        f"a step in {r.num_microbatches} micro-batches of {r.micro_batch_size}"
    )


def search_table(found: "Found", tokens: float) -> "Table":
    """The search's best layouts, a row each, fastest first."""
    from megatron_k2.terminal import table

    best = table(
        *("TP", "PP", "VPP", "EP", "CP", "micro", "recompute", "act. host", "opt. host", "GB"),
        *("step s", "bubble", "exposed", "MFU", "tokens/s", "days"),
        has_names=False,
    )
    for e in found.best:
        r = e.request
        best.add_row(
            *map(str, (r.tp, r.pp, r.vpp, r.ep, r.cp, r.micro_batch_size)),
            ",".join(sorted(r.recompute)) or "none",
            f"{r.activation_offload:.0%}",
            f"{r.optimizer_offload:.0%}",
            f"{e.memory[e.fullest].total / GB:.1f}",
            f"{e.step_seconds:.2f}",
            f"{e.bubble_seconds:.2f}",
            f"{e.exposed_expert_seconds:.2f}",
            f"{e.mfu:.1%}",
            f"{e.tokens_per_second:,.0f}",
            f"{e.days(tokens):.1f}",
        )
    return best
