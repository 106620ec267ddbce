"""Time of one step: arithmetic, what communication is not hidden, the bubble, the optimizer.

A model, not a measurement: FLOPs and bytes are exact, rates are data sheets times an efficiency,
and the efficiencies are assumptions of ours, printed beside every result and open to be changed.
"""

from dataclasses import dataclass

from megatron_k2.planning.cost import traffic
from megatron_k2.planning.cost.activations import formed_again_bytes
from megatron_k2.planning.cost.adapters import layer_flops
from megatron_k2.planning.cost.flops import (
    Flops,
    attention_forward,
    head_forward,
    input_gradients,
    mlp_forward,
    model_flops_per_token,
    orthogonalisation,
    up_projections,
    weight_gradients,
)
from megatron_k2.planning.cost.memory import RESERVED_GB, Memory, layer_activations, rank_memory
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.schedule.chunks import Chunk
from megatron_k2.planning.schedule.pipeline import ScheduleShape
from megatron_k2.planning.schedule.timeline import ChunkCost, exposed, simulate_tasks, span


@dataclass(frozen=True)
class Assumptions:
    """Parts of the data sheet's rate that a kernel reaches.

    Ours, until ``planning/calibration.py`` puts measured ones in their place.
    """

    gemm: float = 0.65
    grouped: float = 0.55
    attention: float = 0.50
    network: float = 0.75
    """Of links between GPUs and to host memory, but for those named below."""
    elementwise: float = 0.15
    """Norms, SwiGLU, routing, permutation, casts: time added, as a part of the products' time."""
    hbm: float = 0.75
    """Part of the memory's rate at which recomputed norms and SwiGLU read and write."""
    reserved_gb: float = RESERVED_GB
    nvlink: float | None = None
    """Of links within a node; ``None``: as ``network``."""
    host: float | None = None
    """Of the link to host memory; ``None``: as ``network``."""
    newton_schulz: float | None = None
    """Of the optimizer's products; ``None``: as ``gemm``."""

    def part(self, name: str) -> float:
        """The field ``name``, or what it falls back on."""
        value = getattr(self, name)
        return getattr(self, FALLBACKS[name]) if value is None else value

    @property
    def links(self) -> traffic.LinkParts:
        """Of links between GPUs."""
        return traffic.LinkParts(self.part("nvlink"), self.network)


FALLBACKS = {"nvlink": "network", "host": "network", "newton_schulz": "gemm"}
"""Field of ``Assumptions`` -> the one it is like where it is not given."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, and what follows."""

    request: RunRequest
    memory: tuple[Memory, ...]
    """Memory of each pipeline rank, in order."""
    step_seconds: float
    arithmetic_seconds: float
    """Mean over the pipeline ranks."""
    expert_seconds: float
    """All-to-all of the busiest rank, hidden or not."""
    exposed_expert_seconds: float
    bubble_seconds: float
    """Idle time of the mean rank but for exposed all-to-all: fill, drain, unequal stages, sends."""
    optimizer_seconds: float
    """Gradient and weight collectives (taken as not hidden), exchange, Newton-Schulz, and copies of
    states from and to the host that it does not hide."""
    newton_schulz_seconds: float
    host_traffic: traffic.HostTraffic
    """Bytes of the rank that copies most."""
    optimizer_copy_seconds: float
    """Optimizer states over PCIe, each direction; both run at once."""
    exposed_copy_seconds: float
    """The part of it that Newton-Schulz does not hide; in ``optimizer_seconds``."""
    mfu: float
    """Model FLOPs, nothing recomputed, over the data sheet's bf16 rate."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all replicas together."""
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
        """Days that ``tokens`` take at this rate."""
        return tokens / self.tokens_per_second / 86400

    def gpu_hours(self, tokens: float) -> float:
        """Hours of GPUs, all of them counted, that ``tokens`` take at this rate."""
        return self.days(tokens) * 24 * self.request.world_size


def _seconds(flops: Flops, r: RunRequest, a: Assumptions) -> float:
    """Seconds of ``flops`` on one tensor-parallel rank, elementwise work included."""
    peak = r.gpu.bf16_tflops * 1e12
    products = flops.gemm / a.gemm + flops.grouped / a.grouped + flops.attention / a.attention
    return products / peak / r.tp * (1 + a.elementwise)


def chunk_costs(r: RunRequest, a: Assumptions) -> list[ChunkCost]:
    """Seconds of every chunk, in the forward's order; TP's and CP's traffic is not hidden."""
    kinds = {is_moe: layer_cost(r, a, is_moe=is_moe) for is_moe in (False, True)}
    return [_chunk_cost(chunk, kinds, r, a) for chunk in r.chunks()]


def layer_cost(r: RunRequest, a: Assumptions, *, is_moe: bool = True) -> ChunkCost:
    """Seconds of one layer and micro-batch; ``send`` is the chunk's."""
    p, tokens = r.preset, r.tokens_per_microbatch
    split = traffic.tensor_parallel(r)
    context = traffic.network_seconds(r, traffic.context_parallel(r), r.tp * r.cp, a.links)
    is_widened = r.document_tokens > 0 and r.modules == "transformer_engine"
    attention = attention_forward(p, r.attended_length, is_packed=is_widened)
    mlp = mlp_forward(p, is_moe=is_moe)
    again = Flops(up_projections(p) if "mla_up" in r.recompute else 0.0)
    weights = weight_gradients(attention) + weight_gradients(mlp)
    if r.lora_rank:  # of frozen weights there is no gradient; the adapters' go with the MLP's
        weights = Flops(*layer_flops(p, r.lora_rank, is_moe=is_moe))
        mlp += weights
    per_byte = tokens / (r.gpu.hbm_gb_per_s * 1e9 * a.hbm)
    attention_again, mlp_again = (
        per_byte * size for size in formed_again_bytes(p, r.tp, r.recompute, is_moe=is_moe)
    )
    moved = layer_activations(r, is_moe=is_moe).on_host

    def seconds(flops: Flops) -> float:
        return _seconds(flops * tokens, r, a)

    return ChunkCost(
        attention_forward=seconds(attention)
        + context
        + traffic.network_seconds(r, split.forward, r.tp, a.links),
        mlp_forward=seconds(mlp),
        attention_backward=seconds(input_gradients(attention) + again)
        + attention_again
        + 2 * context
        + traffic.network_seconds(r, split.backward, r.tp, a.links),
        mlp_backward=seconds(input_gradients(mlp)) + mlp_again,
        weight_gradients=seconds(weights),
        dispatch=_dispatch_seconds(r, a) if is_moe else 0.0,
        send=0.0,
        offload=moved / (r.gpu.pcie_gb_per_s * 1e9 * a.part("host")),
    )


def _dispatch_seconds(r: RunRequest, a: Assumptions) -> float:
    """Dispatch or combine of one MoE layer; probabilities go along once, so half of them each."""
    payload = traffic.expert_dispatch(r) + traffic.expert_probabilities(r) / 2
    return traffic.expert_seconds(r, payload, a.links)


def _chunk_cost(
    chunk: Chunk, kinds: dict[bool, ChunkCost], r: RunRequest, a: Assumptions
) -> ChunkCost:
    layers = [kinds[layer >= r.preset.num_dense_layers] for layer in chunk.layers]
    head = head_forward(r.preset) * r.tokens_per_microbatch
    head_seconds = _seconds(head, r, a) if chunk.has_head else 0.0
    send = traffic.network_seconds(r, traffic.pipeline_send(r), r.world_size, a.links)
    return ChunkCost(
        attention_forward=sum(c.attention_forward for c in layers),
        mlp_forward=sum(c.mlp_forward for c in layers) + head_seconds,
        attention_backward=sum(c.attention_backward for c in layers),
        mlp_backward=sum(c.mlp_backward for c in layers) + head_seconds,
        weight_gradients=sum(c.weight_gradients for c in layers)
        + (0.0 if r.lora_rank else head_seconds),
        dispatch=sum(c.dispatch for c in layers),
        send=send,
        offload=sum(c.offload for c in layers),
    )


@dataclass(frozen=True)
class _OptimizerSeconds:
    """Seconds of the optimizer's step on the slowest rank, by part."""

    collectives: float
    newton_schulz: float
    copy: float

    @property
    def exposed_copy(self) -> float:
        """States visit one bucket ahead, so that copies run under the bucket before's products."""
        return max(0.0, self.copy - self.newton_schulz)

    @property
    def total(self) -> float:
        return self.collectives + self.newton_schulz + self.exposed_copy


def _optimizer(r: RunRequest, memory: tuple[Memory, ...], a: Assumptions) -> _OptimizerSeconds:
    once = [traffic.step_traffic(r, m.parameters) for m in memory]
    moved = max(t.gradients + t.weights + t.muonclip for t in once)
    # Matrices are planned evenly over all ranks of the world (optimizer/sharded/homes.py).
    rate = r.gpu.bf16_tflops * 1e12 * a.part("newton_schulz")
    orthogonal = orthogonalisation(r.preset, r.lora_rank) / r.world_size / rate
    group = r.tp * r.data_ranks
    moving = max(m.optimizer_on_host for m in memory)
    return _OptimizerSeconds(
        collectives=traffic.network_seconds(r, moved, group, a.links),
        newton_schulz=orthogonal,
        copy=moving / (r.gpu.pcie_gb_per_s * 1e9 * a.part("host")),
    )


def schedule_shape(r: RunRequest, num_microbatches: int | None = None) -> ScheduleShape:
    """The pipeline's schedule, of ``num_microbatches`` in place of the run's own."""
    count = r.num_microbatches if num_microbatches is None else num_microbatches
    return ScheduleShape(r.pp, r.vpp, count, r.has_overlap and r.vpp > 1)


def _pipeline(r: RunRequest, costs: list[ChunkCost]) -> tuple[float, float]:
    """(length, exposed all-to-all a rank), in seconds.

    A long schedule repeats, so it is simulated short, twice, and continued in a straight line.
    """

    def simulated(num_microbatches: int) -> tuple[float, float]:
        tasks = simulate_tasks(schedule_shape(r, num_microbatches), costs)
        return span(tasks), exposed(tasks, "all-to-all") / r.pp

    few = 2 * max(r.pp, 4)
    if r.num_microbatches <= 2 * few:
        return simulated(r.num_microbatches)
    short, long = simulated(few), simulated(2 * few)
    rest = (r.num_microbatches - few) / few
    return short[0] + (long[0] - short[0]) * rest, short[1] + (long[1] - short[1]) * rest


def estimate(r: RunRequest, a: Assumptions | None = None) -> Estimate:
    """Memory and time of one step.

    Raises:
        UserError: for a run that cannot be laid out.
    """
    a = a or Assumptions()
    r.check()
    memory = tuple(rank_memory(r, rank, a.reserved_gb) for rank in range(r.pp))
    costs = chunk_costs(r, a)
    pipeline, exposed_expert = _pipeline(r, costs)
    arithmetic = r.num_microbatches / r.pp * sum(map(arithmetic_seconds, costs))
    by_rank = [sum(costs[v * r.pp + rank].dispatch for v in range(r.vpp)) for rank in range(r.pp)]
    optimizer = _optimizer(r, memory, a)
    step = pipeline + optimizer.total
    moved = [traffic.host_traffic(r, rank, m.parameters) for rank, m in enumerate(memory)]
    useful = model_flops_per_token(r.preset, r.attended_length) * r.tokens_per_step
    useful *= 2 / 3 if r.lora_rank else 1  # forward, and gradients of inputs alone
    return Estimate(
        request=r,
        memory=memory,
        step_seconds=step,
        arithmetic_seconds=arithmetic,
        expert_seconds=4 * r.num_microbatches * max(by_rank),
        exposed_expert_seconds=exposed_expert,
        bubble_seconds=pipeline - arithmetic - exposed_expert,
        optimizer_seconds=optimizer.total,
        newton_schulz_seconds=optimizer.newton_schulz,
        host_traffic=max(moved, key=lambda once: once.activations + once.optimizer),
        optimizer_copy_seconds=optimizer.copy,
        exposed_copy_seconds=optimizer.exposed_copy,
        mfu=useful / (step * r.world_size * r.gpu.bf16_tflops * 1e12),
    )


def arithmetic_seconds(cost: ChunkCost) -> float:
    """One micro-batch, forward and backward, on one chunk."""
    forward = cost.attention_forward + cost.mlp_forward
    return forward + cost.attention_backward + cost.mlp_backward + cost.weight_gradients
