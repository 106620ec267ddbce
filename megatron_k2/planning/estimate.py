"""Time of one step: arithmetic, what communication is not hidden, the bubble, the optimizer.

A model, not a measurement: FLOPs and bytes are exact, rates are data sheets times an efficiency,
and the efficiencies are assumptions of ours, printed beside every result and open to be changed.
"""

from dataclasses import dataclass

from megatron_k2.planning import traffic
from megatron_k2.planning.flops import (
    Flops,
    head_forward,
    layer_backward,
    layer_forward,
    model_flops_per_token,
    orthogonalisation,
)
from megatron_k2.planning.memory import RESERVED_GB, Memory, rank_memory
from megatron_k2.planning.pipeline import Shape, makespan, simulate
from megatron_k2.planning.request import RunRequest


@dataclass(frozen=True)
class Assumptions:
    """Parts of the data sheet's rate that a kernel reaches. Ours; nothing here was measured."""

    gemm: float = 0.65
    grouped: float = 0.55
    attention: float = 0.50
    network: float = 0.75
    elementwise: float = 0.15
    """Norms, SwiGLU, routing, permutation, casts: time added, as a part of the products' time."""
    reserved_gb: float = RESERVED_GB


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, and what follows."""

    request: RunRequest
    memory: tuple[Memory, ...]
    """A pipeline rank each."""
    step_seconds: float
    arithmetic_seconds: float
    """Mean over the pipeline ranks."""
    expert_seconds: float
    """All-to-all of the busiest rank, hidden or not."""
    exposed_expert_seconds: float
    bubble_seconds: float
    """Idle time of the mean rank: fill, drain, unequal stages, sends."""
    optimizer_seconds: float
    """Gradient and weight collectives (taken as not hidden), exchange, Newton-Schulz."""
    newton_schulz_seconds: float
    mfu: float
    """Model FLOPs, nothing recomputed, over the data sheet's bf16 rate."""

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run."""
        return self.request.tokens_per_step / self.step_seconds

    @property
    def fullest(self) -> int:
        """Pipeline rank with the most device memory in use."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def fits(self) -> bool:
        """Whether every rank's bytes are within the GPU's memory."""
        return self.memory[self.fullest].total <= self.request.gpu.memory_gb * 1e9

    def days(self, tokens: float) -> float:
        """For ``tokens`` at this rate."""
        return tokens / self.tokens_per_second / 86400

    def gpu_hours(self, tokens: float) -> float:
        """Likewise."""
        return self.days(tokens) * 24 * self.request.world_size


def _seconds(flops: Flops, r: RunRequest, a: Assumptions) -> float:
    """On one tensor-parallel rank."""
    peak = r.gpu.bf16_tflops * 1e12
    products = flops.gemm / a.gemm + flops.grouped / a.grouped + flops.attention / a.attention
    return products / peak / r.tp * (1 + a.elementwise)


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of one micro-batch on one chunk."""

    forward: float
    backward: float
    expert: float
    """All-to-all of the forward: dispatch and combine of its MoE layers; as much in backward."""


def chunk_times(r: RunRequest, a: Assumptions) -> list[ChunkTimes]:
    """Of every chunk, in the forward's order; tensor and context parallel traffic is not hidden."""
    p, tokens = r.preset, r.tokens_per_microbatch
    dispatch = 2 * traffic.expert_dispatch(r) + traffic.expert_probabilities(r)
    expert = traffic.expert_seconds(r, dispatch, a.network)
    split = traffic.network_seconds(r, traffic.tensor_parallel(r), r.tp, a.network)
    split += traffic.network_seconds(r, traffic.context_parallel(r), r.tp * r.cp, a.network)
    layers: dict[bool, tuple[float, float]] = {
        is_moe: (
            _seconds(layer_forward(p, r.seq_length, is_moe=is_moe) * tokens, r, a) + split,
            _seconds(layer_backward(p, r.seq_length, r.recompute, is_moe=is_moe) * tokens, r, a)
            + 2 * split,
        )
        for is_moe in (False, True)
    }
    head = _seconds(head_forward(p) * tokens, r, a)
    found = []
    for chunk in r.chunks():
        kinds = [layer >= p.num_dense_layers for layer in chunk.layers]
        found.append(
            ChunkTimes(
                forward=sum(layers[kind][0] for kind in kinds) + head * chunk.has_head,
                backward=sum(layers[kind][1] for kind in kinds) + 2 * head * chunk.has_head,
                expert=expert * sum(kinds),
            )
        )
    return found


def _optimizer(r: RunRequest, memory: tuple[Memory, ...], a: Assumptions) -> tuple[float, float]:
    """(all of it, Newton-Schulz alone): the slowest rank's."""
    once = [traffic.step_traffic(r, m.parameters) for m in memory]
    moved = max(t.gradients + t.weights + t.muonclip for t in once)
    # Matrices are planned evenly over all ranks of the world (optimizer/plan.py).
    orthogonal = orthogonalisation(r.preset) / r.world_size / (r.gpu.bf16_tflops * 1e12 * a.gemm)
    group = r.tp * r.dense_shards
    host = max(m.optimizer_on_host for m in memory) * 2 / (r.gpu.pcie_gb_per_s * 1e9 * a.network)
    return traffic.network_seconds(r, moved, group, a.network) + orthogonal + host, orthogonal


def estimate(r: RunRequest, a: Assumptions | None = None) -> Estimate:
    """Memory and time of one step.

    Raises:
        UserError: for a run that cannot be laid out.
    """
    a = a or Assumptions()
    r.check()
    memory = tuple(rank_memory(r, rank, a.reserved_gb) for rank in range(r.pp))
    times = chunk_times(r, a)
    has_extra = r.has_overlap and r.vpp > 1
    # Hidden: one micro-batch's all-to-all under the arithmetic of the other of its pair.
    exposed = [
        max(0.0, 2 * t.expert - (t.forward + t.backward)) / 2 if has_extra else t.expert
        for t in times
    ]
    forward = [t.forward + e for t, e in zip(times, exposed, strict=True)]
    backward = [t.backward + e for t, e in zip(times, exposed, strict=True)]
    send = traffic.network_seconds(r, traffic.pipeline_send(r), r.world_size, a.network)
    pipeline = _pipeline_seconds(r, forward, backward, send if r.pp > 1 else 0.0)
    busy = r.num_microbatches * (sum(forward) + sum(backward)) / r.pp
    by_rank = [
        sum(times[v * r.pp + rank].expert for v in range(r.vpp)) * 2 * r.num_microbatches
        for rank in range(r.pp)
    ]
    optimizer, orthogonal = _optimizer(r, memory, a)
    step = pipeline + optimizer
    useful = model_flops_per_token(r.preset, r.seq_length) * r.tokens_per_step
    return Estimate(
        request=r,
        memory=memory,
        step_seconds=step,
        arithmetic_seconds=r.num_microbatches * sum(t.forward + t.backward for t in times) / r.pp,
        expert_seconds=max(by_rank),
        exposed_expert_seconds=2 * r.num_microbatches * sum(exposed) / r.pp,
        bubble_seconds=pipeline - busy,
        optimizer_seconds=optimizer,
        newton_schulz_seconds=orthogonal,
        mfu=useful / (step * r.world_size * r.gpu.bf16_tflops * 1e12),
    )


def _pipeline_seconds(
    r: RunRequest, forward: list[float], backward: list[float], send: float
) -> float:
    """Of the whole schedule; a long one repeats, so it is simulated short and continued."""
    few = 3 * r.pp
    if r.num_microbatches <= 2 * few:
        return makespan(simulate(_shape(r, r.num_microbatches), forward, backward, send))
    short = makespan(simulate(_shape(r, few), forward, backward, send))
    longer = makespan(simulate(_shape(r, 2 * few), forward, backward, send))
    return short + (longer - short) * (r.num_microbatches - few) / few


def _shape(r: RunRequest, num_microbatches: int) -> Shape:
    return Shape(r.pp, r.vpp, num_microbatches, r.has_overlap and r.vpp > 1)
