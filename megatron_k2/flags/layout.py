"""A planned run as Megatron's flags: layout, batch, overlap, recompute, offload.

Architecture and schedule are the preset's (``flags/megatron.py``); these come after and win.
"""

from megatron_k2.errors import UserError
from megatron_k2.planning.cost.offload import movable, offload_fraction, offload_modules
from megatron_k2.planning.request import Recompute, RunRequest
from megatron_k2.planning.schedule.chunks import megatron_layout

RECOMPUTE_MODULES: dict[Recompute, str] = {
    "norm": "layernorm",
    "swiglu": "moe_act",
    "mla_up": "mla_up_proj",
}
"""Megatron's names; ``moe_act`` recomputes the experts' SwiGLU, not the one dense layer's."""


def layout_flags(r: RunRequest) -> list[str]:
    """Parallel degrees, the split of layers over pipeline ranks, sequence, batch, adapters."""
    batch = f"""
        --seq-length {r.seq_length} --max-position-embeddings {r.seq_length}
        --micro-batch-size {r.micro_batch_size} --global-batch-size {r.sequences_per_step}
    """.split()
    split = ["--pipeline-model-parallel-layout", megatron_layout(r.chunks())] if r.pp > 1 else []
    adapters = ["--lora-rank", str(r.lora_rank)] if r.lora_rank else []
    adapters += ["--lora-base-fp8"] if r.lora_base_fp8 else []
    return [*r.degree_flags(), *batch, *split, *adapters]


def memory_flags(r: RunRequest) -> list[str]:
    """Recompute and offload; FP8 storage of activations.

    Raises:
        UserError: where the plan moves more than the flags can.
    """
    flags: list[str] = []
    if r.recompute:
        names = [RECOMPUTE_MODULES[name] for name in RECOMPUTE_MODULES if name in r.recompute]
        flags += ["--recompute-granularity", "selective", "--recompute-modules", *names]
    if "swiglu" in r.recompute and r.modules == "local":
        flags.append("--moe-grouped-gemm")  # Megatron's condition for moe_act
    if r.fp8_storage:
        flags += ["--fp8-activation-storage"]
    if r.activation_offload:
        most = movable(r).part
        if r.activation_offload > most:
            raise UserError(
                f"the plan has {r.activation_offload:.0%} of the activations on the host, and "
                f"Megatron's offload can move {most:.1%} of what is kept; plan with "
                f"--activation-offload {most:.2f} at most"
            )
        flags += ["--fine-grained-activation-offloading", "--offload-modules"]
        flags += [*offload_modules(r.recompute)]
        flags += ["--activation-offload-fraction", f"{offload_fraction(r):.2f}"]
    if r.optimizer_offload:
        flags += ["--optimizer-cpu-offload", "--optimizer-offload-fraction"]
        flags += [f"{r.optimizer_offload:g}"]
    return flags


def speed_flags(r: RunRequest) -> list[str]:
    """bf16, ZeRO-1, and what hides communication."""
    flags = (
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()
    )
    if r.has_overlap and r.vpp > 1 and r.ep > 1:
        flags += ["--overlap-moe-expert-parallel-comm"]
        flags += [] if r.lora_rank else ["--delay-wgrad-compute"]  # frozen: nothing to delay
    return flags


def megatron_flags(r: RunRequest) -> list[str]:
    """Everything that the plan decides."""
    return [*layout_flags(r), *speed_flags(r), *memory_flags(r)]
