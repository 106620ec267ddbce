"""Checks on a parallel layout, before anything is started. Pure arithmetic.

Megatron checks most of this too, but after seconds of start-up, on every rank at once, and two
layouts it computes silently wrong.
"""

from dataclasses import dataclass

from megatron_k2.errors import UserError


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


def _must_divide(name: str, number: int, by_name: str, by: int) -> None:
    if by < 1 or number % by:
        near = ", ".join(map(str, nearest_divisors(number, by)))
        raise UserError(f"{name}={number} does not divide by {by_name}={by}; nearest: {near}")


def check_layout(r: LayoutRequest) -> None:
    """Refuse a layout that cannot run, or that Megatron would compute wrongly.

    Raises:
        UserError: naming the value, what it must divide by, and the nearest that does.
    """
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
    if cp > 1 and r.seq_length % (2 * cp):
        raise UserError(
            f"seq_length={r.seq_length} does not divide by 2 x context_parallel_size={2 * cp} "
            f"(zigzag halves); nearest: {r.seq_length // (2 * cp) * 2 * cp or 2 * cp}"
        )
    if (r.seq_length // cp) % tp:
        raise UserError(
            f"seq_length={r.seq_length} over context_parallel_size={cp} does not divide by "
            f"tensor_model_parallel_size={tp}, which sequence parallelism needs"
        )
    data_parallel = r.world_size // (tp * r.pipeline_model_parallel_size * cp)
    step = r.micro_batch_size * data_parallel
    if r.global_batch_size % step:
        raise UserError(
            f"global_batch_size={r.global_batch_size} does not divide by micro_batch_size x data "
            f"parallel = {r.micro_batch_size} x {data_parallel} = {step}; nearest: "
            f"{max(1, r.global_batch_size // step) * step}"
        )


def _check_pipeline(r: LayoutRequest) -> None:
    pp, vpp = r.pipeline_model_parallel_size, r.num_virtual_stages
    if not r.has_pipeline_layout and r.num_layers % (pp * vpp):
        raise UserError(
            f"num_layers={r.num_layers} does not divide by PP x virtual stages = {pp} x {vpp}; "
            "give --pipeline-model-parallel-layout, or a divisor: "
            f"{', '.join(map(str, nearest_divisors(r.num_layers, pp * vpp)))}"
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
