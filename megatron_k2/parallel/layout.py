"""Checks on a parallel layout, before anything is started. Pure arithmetic.

Megatron checks most of this too, but after seconds of start-up, on every rank at once, and two
layouts it computes silently wrong.
"""

import math
from dataclasses import dataclass

from megatron_k2.errors import UserError

COUNTS = (
    "world_size",
    "global_batch_size",
    "micro_batch_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_virtual_stages",
)


@dataclass(frozen=True)
class LayoutRequest:
    """What a run asks for; defaults are Megatron's."""

    world_size: int
    num_layers: int
    num_attention_heads: int
    num_moe_experts: int | None
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    num_virtual_stages: int = 1
    """Model chunks a pipeline rank holds."""
    has_pipeline_layout: bool = False
    """``--pipeline-model-parallel-layout`` places the layers by hand."""
    overlap_p2p_comm: bool = True
    fp4: str | None = None
    has_transformer_engine: bool = False


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor of ``number`` below ``wanted`` and the smallest above, if any."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return below + above


def nearest_multiples(number: int, unit: int) -> list[int]:
    """The multiples of ``unit`` around ``number``, which is none; positive ones only."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _must_divide(name: str, number: int, by_name: str, by: int) -> None:
    if number % by:
        near = _listed(nearest_divisors(number, by))
        raise UserError(f"{name}={number} does not divide by {by_name}={by}; nearest: {near}")


def check_layout(r: LayoutRequest) -> None:
    """Refuse a layout that cannot run, or that Megatron would compute wrongly.

    Raises:
        UserError: naming the value, what it must divide by, and the nearest that does.
    """
    for name in COUNTS:
        if getattr(r, name) < 1:
            raise UserError(f"{name}={getattr(r, name)}: expected at least 1")
    tp, pp, cp = (
        r.tensor_model_parallel_size,
        r.pipeline_model_parallel_size,
        r.context_parallel_size,
    )
    model_ranks = tp * pp * cp
    if r.world_size % model_ranks:
        raise UserError(
            f"world size {r.world_size} does not divide by TP x PP x CP = {tp} x {pp} x {cp} = "
            f"{model_ranks}; start a multiple of {model_ranks} ranks"
        )
    expert_ranks = r.expert_tensor_parallel_size * r.expert_model_parallel_size * pp
    if r.num_moe_experts and r.world_size % expert_ranks:
        raise UserError(
            f"world size {r.world_size} does not divide by expert TP x EP x PP = "
            f"{r.expert_tensor_parallel_size} x {r.expert_model_parallel_size} x {pp} = "
            f"{expert_ranks}; start a multiple of {expert_ranks} ranks"
        )
    _must_divide("num_attention_heads", r.num_attention_heads, "tensor_model_parallel_size", tp)
    if r.num_moe_experts:
        _must_divide(
            "num_moe_experts",
            r.num_moe_experts,
            "expert_model_parallel_size",
            r.expert_model_parallel_size,
        )
    _check_sequence_and_batch(r)
    _check_pipeline(r)
    if r.fp4 and not r.has_transformer_engine:
        raise UserError(
            f"--fp4-format {r.fp4} needs Transformer Engine; without it Megatron ignores the flag "
            "and trains in the base precision"
        )


def _check_sequence_and_batch(r: LayoutRequest) -> None:
    cp, tp = r.context_parallel_size, r.tensor_model_parallel_size
    zigzag = 2 * cp if cp > 1 else 1
    near = _listed(nearest_multiples(r.seq_length, math.lcm(zigzag, cp * tp)))
    if r.seq_length % zigzag:
        raise UserError(
            f"seq_length={r.seq_length} does not divide by 2 x context_parallel_size={zigzag} "
            f"(zigzag halves); nearest: {near}"
        )
    if (r.seq_length // cp) % tp:
        raise UserError(
            f"seq_length={r.seq_length} over context_parallel_size={cp} does not divide by "
            f"tensor_model_parallel_size={tp}, which sequence parallelism needs; nearest: {near}"
        )
    data_parallel = r.world_size // (tp * r.pipeline_model_parallel_size * cp)
    step = r.micro_batch_size * data_parallel
    if r.global_batch_size % step:
        raise UserError(
            f"global_batch_size={r.global_batch_size} does not divide by micro_batch_size x data "
            f"parallel = {r.micro_batch_size} x {data_parallel} = {step}; nearest: "
            f"{_listed(nearest_multiples(r.global_batch_size, step))}"
        )


def _check_pipeline(r: LayoutRequest) -> None:
    pp, vpp = r.pipeline_model_parallel_size, r.num_virtual_stages
    if not r.has_pipeline_layout and r.num_layers % (pp * vpp):
        raise UserError(
            f"num_layers={r.num_layers} does not divide by PP x virtual stages = {pp} x {vpp}; "
            "give --pipeline-model-parallel-layout, or a divisor: "
            f"{_listed(nearest_divisors(r.num_layers, pp * vpp))}"
        )
    if vpp == 1:
        return
    if pp == 1:
        raise UserError("virtual pipeline stages need --pipeline-model-parallel-size above 1")
    if pp == 2 and not r.overlap_p2p_comm:
        raise UserError(
            "PP=2 with virtual stages and batched point-to-point calls exchanges the wrong tensors "
            "in Megatron-Core 0.19 (both neighbours are the same rank); drop "
            "--no-overlap-p2p-communication"
        )
