"""Bytes one GPU sends, by parallel dimension: a micro-batch's and a step's.

Counted is what leaves the GPU: of a payload over a group of n, the part (n − 1) / n; of a ring
collective likewise. Routing is taken as even.
"""

from dataclasses import dataclass

from megatron_k2.planning.cost.memory import (
    EXCHANGE_BYTES,
    GRADIENT_BYTES,
    WEIGHT_BYTES,
    Parameters,
    chunk_activations,
    optimizer_bytes,
)
from megatron_k2.planning.gpus import GPUS_PER_NODE
from megatron_k2.planning.request import RunRequest

PROBABILITY_BYTES = 4
"""Routing weights travel with their tokens in fp32."""


def _away(n: int) -> float:
    return (n - 1) / n


def expert_dispatch(r: RunRequest, element_bytes: float = WEIGHT_BYTES) -> float:
    """One MoE layer's forward dispatch of one micro-batch; combine and both backwards are alike.

    Args:
        r: the run.
        element_bytes: of an activation: 2 in bf16.
    """
    copies = r.tokens_per_microbatch / r.tp * r.preset.moe_router_topk
    return copies * r.preset.hidden_size * element_bytes * _away(r.ep)


def expert_probabilities(r: RunRequest) -> float:
    """Routing weights beside the dispatched tokens; once forward and once backward."""
    copies = r.tokens_per_microbatch / r.tp * r.preset.moe_router_topk
    return copies * PROBABILITY_BYTES * _away(r.ep)


def pipeline_send(r: RunRequest, element_bytes: float = WEIGHT_BYTES) -> float:
    """One micro-batch from one chunk to the next, either direction."""
    if r.pp == 1:
        return 0.0
    return r.tokens_per_microbatch / r.tp * r.preset.hidden_size * element_bytes


@dataclass(frozen=True)
class TensorParallel:
    """One micro-batch's gathers and scatters under sequence parallelism, in bytes sent."""

    forward: float
    """Bytes of one layer: latents and the MLP's input gathered, both outputs scattered."""
    backward: float
    """The same turned round, and inputs of column-parallel products gathered again."""
    ends: float
    """Embedding and output head, forward and backward."""


def tensor_parallel(r: RunRequest, element_bytes: float = WEIGHT_BYTES) -> TensorParallel:
    """MLA's down-projections are whole on every rank, so that only their latents are gathered.

    Experts are whole on a rank (expert tensor parallelism 1); of an MoE layer the shared expert's
    input and output move, as much as a dense layer's.
    """
    p = r.preset
    hidden = r.tokens_per_microbatch * p.hidden_size * element_bytes * _away(r.tp)
    query = 1.0 if p.q_lora_rank is None else p.q_lora_rank / p.hidden_size
    again = query + p.kv_lora_rank / p.hidden_size
    latents = again + p.qk_pos_emb_head_dim / p.hidden_size
    return TensorParallel((latents + 3) * hidden, (latents + again + 4) * hidden, 5 * hidden)


def context_parallel(r: RunRequest, element_bytes: float = WEIGHT_BYTES) -> float:
    """One layer's forward of one micro-batch: keys and values to the other ranks of the group."""
    p = r.preset
    heads = p.num_attention_heads // r.tp
    width = heads * (p.qk_head_dim + p.qk_pos_emb_head_dim + p.v_head_dim)
    return r.tokens_per_microbatch * width * element_bytes * (r.cp - 1)


@dataclass(frozen=True)
class StepTraffic:
    """Once a step, one GPU of a pipeline rank."""

    gradients: float
    """Bytes of ZeRO-1's reduce-scatter, in fp32."""
    weights: float
    """Bytes of ZeRO-1's all-gather, in bf16."""
    muonclip: float
    """Pieces of dense matrices to their homes and results back; at most, since a piece already at
    home stays. Experts are cut between matrices and exchange nothing."""


def step_traffic(r: RunRequest, parameters: Parameters) -> StepTraffic:
    """Bytes that the optimizer's collectives send, a GPU and step."""
    dense = (parameters.dense_muon + parameters.adamw) * _away(r.data_ranks)
    experts = parameters.expert_muon * _away(r.expert_data_ranks)
    owned = parameters.dense_muon / r.data_ranks
    return StepTraffic(
        gradients=GRADIENT_BYTES * (dense + experts),
        weights=WEIGHT_BYTES * (dense + experts),
        muonclip=2 * EXCHANGE_BYTES * owned * _away(r.data_ranks),
    )


@dataclass(frozen=True)
class HostTraffic:
    """Once a step, one GPU of a pipeline rank: bytes to host memory, and as many back."""

    activations: float
    """Activations of all micro-batches of the step."""
    optimizer: float
    """Momenta, moments and masters that live there."""


def host_traffic(r: RunRequest, rank: int, parameters: Parameters) -> HostTraffic:
    """Bytes that a GPU of pipeline rank ``rank`` copies to the host in a step."""
    ours = [chunk for chunk in r.chunks() if chunk.rank == rank]
    moved = sum(chunk_activations(r, chunk).on_host for chunk in ours)
    return HostTraffic(
        activations=moved * r.num_microbatches,
        optimizer=optimizer_bytes(r, parameters) * r.optimizer_offload,
    )


@dataclass(frozen=True)
class LinkParts:
    """Parts of the data sheet's rates that links between GPUs reach."""

    in_node: float
    between_nodes: float


def expert_seconds(r: RunRequest, num_bytes: float, parts: LinkParts) -> float:
    """Time of an all-to-all over the expert-parallel group, whose ranks are neighbours.

    Inside a node over NVLink and between nodes over the network at the same time.
    """
    if r.ep == 1:
        return 0.0
    group = r.ep * r.tp
    in_node = min(group, GPUS_PER_NODE)
    outside = max(0, group - in_node) / max(1, group - 1)
    return max(
        num_bytes * (1 - outside) / (r.gpu.nvlink_gb_per_s * 1e9 * parts.in_node),
        num_bytes * outside / (r.gpu.network_gb_per_s * 1e9 * parts.between_nodes),
    )


def network_seconds(r: RunRequest, num_bytes: float, group: int, parts: LinkParts) -> float:
    """Time of a ring or neighbour send within a group of ``group`` GPUs in a row."""
    if group <= GPUS_PER_NODE:
        return num_bytes / (r.gpu.nvlink_gb_per_s * 1e9 * parts.in_node)
    return num_bytes / (r.gpu.network_gb_per_s * 1e9 * parts.between_nodes)
