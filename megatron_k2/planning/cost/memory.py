"""Bytes on each pipeline rank: weights, gradients, optimizer states, activations.

Weights bf16 and gradients fp32, as the report has them (section 2.4.2: together about 6 TB).
Optimizer states are ZeRO-1 shards: a Muon parameter has a momentum and a master weight, 8 bytes, an
AdamW parameter two moments and a master weight, 12. Of a fraction on the host a run keeps at least
that much there, and less than one shard's states more (``optimizer/offload/choice.py``), so what is
planned on the device is not exceeded. Ranks that differ only in TP, EP or DP hold the same number
of everything (experts evenly loaded), so there is one row a pipeline rank.
"""

from dataclasses import dataclass

from megatron_k2.optimizer.offload.choice import AHEAD, WINDOW_BYTES
from megatron_k2.optimizer.sharded.bucket_size import default_bucket_size
from megatron_k2.planning.cost.activations import (
    head_bytes,
    layer_bytes,
    packed_attention_bytes,
)
from megatron_k2.planning.cost.adapters import kept_bytes, layer_elements
from megatron_k2.planning.cost.offload import movable
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.schedule.chunks import Chunk
from megatron_k2.planning.schedule.pipeline import ScheduleShape, peak_live
from megatron_k2.presets import ModelPreset

WEIGHT_BYTES, GRADIENT_BYTES = 2, 4
BLOCK_FP8_BYTES = 1 + 4 / 128**2
"""A weight in block FP8 with its part of a scale."""
MUON_STATE_BYTES, ADAMW_STATE_BYTES = 8, 12
EXCHANGE_BYTES = 2
"""An element in MuonClip's all-to-alls: bf16, the default of ``--muonclip-dtype``."""
BATCH_BYTES = 24
"""Bytes an element takes while it is orthogonalised: fp32 copies, and the products in bf16."""
RESERVED_GB = 6.0
"""CUDA context, NCCL buffers, cuBLAS workspaces, fragmentation: our estimate, to be overridden."""


@dataclass(frozen=True)
class Parameters:
    """Elements (not bytes) that one rank holds, by the optimizer they go to."""

    dense_muon: int
    """Attention, dense FFN, shared expert, router."""
    expert_muon: int
    adamw: int
    """Embedding, output head and the norms' gains."""

    @property
    def total(self) -> int:
        """Elements of the rank, whatever their optimizer."""
        return self.dense_muon + self.expert_muon + self.adamw

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            self.dense_muon + other.dense_muon,
            self.expert_muon + other.expert_muon,
            self.adamw + other.adamw,
        )


def attention_parameters(p: ModelPreset, tp: int) -> Parameters:
    """One layer's MLA with its norms; down-projections are whole on every tensor-parallel rank."""
    heads = p.num_attention_heads // tp
    query_rows = heads * (p.qk_head_dim + p.qk_pos_emb_head_dim)
    matrices = heads * p.v_head_dim * p.hidden_size
    matrices += (p.kv_lora_rank + p.qk_pos_emb_head_dim) * p.hidden_size
    matrices += heads * (p.qk_head_dim + p.v_head_dim) * p.kv_lora_rank
    norms = 2 * p.hidden_size + p.kv_lora_rank
    if p.q_lora_rank is None:
        matrices += query_rows * p.hidden_size
    else:
        matrices += p.q_lora_rank * (p.hidden_size + query_rows)
        norms += p.q_lora_rank
    return Parameters(matrices, 0, norms)


def layer_parameters(p: ModelPreset, *, is_moe: bool, tp: int, ep: int) -> Parameters:
    """One decoder layer on one rank."""
    if not is_moe:
        dense = 3 * p.hidden_size * (p.ffn_hidden_size // tp)
        return attention_parameters(p, tp) + Parameters(dense, 0, 0)
    shared = 3 * p.hidden_size * (p.moe_shared_expert_intermediate_size // tp)
    router = p.num_moe_experts * p.hidden_size
    experts = p.num_moe_experts // ep * 3 * p.hidden_size * p.moe_ffn_hidden_size
    return attention_parameters(p, tp) + Parameters(shared + router, experts, 0)


def rank_parameters(r: RunRequest, rank: int) -> Parameters:
    """Everything on a GPU of pipeline rank ``rank``."""
    p = r.preset
    found = Parameters(0, 0, 0)
    for chunk in r.chunks():
        if chunk.rank != rank:
            continue
        for layer in chunk.layers:
            is_moe = layer >= p.num_dense_layers
            found += layer_parameters(p, is_moe=is_moe, tp=r.tp, ep=r.ep)
        ends = chunk.has_embedding + chunk.has_head
        vocabulary = ends * (p.vocab_size // r.tp) * p.hidden_size
        found += Parameters(0, 0, vocabulary + p.hidden_size * chunk.has_head)
    return found


def trained_parameters(r: RunRequest, rank: int) -> Parameters:
    """What of a GPU of pipeline rank ``rank`` trains: all of it, or its adapters."""
    if not r.lora_rank:
        return rank_parameters(r, rank)
    found = Parameters(0, 0, 0)
    for chunk in r.chunks():
        if chunk.rank != rank:
            continue
        for layer in chunk.layers:
            is_moe = layer >= r.preset.num_dense_layers
            dense, experts = layer_elements(r.preset, r.lora_rank, is_moe=is_moe, tp=r.tp, ep=r.ep)
            found += Parameters(dense, experts, 0)
    return found


def frozen_elements(r: RunRequest, rank: int) -> int:
    """What of a GPU of pipeline rank ``rank`` does not train: under adapters, their base."""
    return rank_parameters(r, rank).total if r.lora_rank else 0


def frozen_bytes(r: RunRequest, rank: int) -> float:
    """Of the frozen weights: bf16, or the layers' linears in block FP8 with their scales."""
    elements = frozen_elements(r, rank)
    if not r.lora_base_fp8:
        return WEIGHT_BYTES * elements
    base, p = rank_parameters(r, rank), r.preset
    layers = [layer for chunk in r.chunks() if chunk.rank == rank for layer in chunk.layers]
    routers = sum(layer >= p.num_dense_layers for layer in layers) * p.num_moe_experts
    linears = base.dense_muon + base.expert_muon - routers * p.hidden_size
    return BLOCK_FP8_BYTES * linears + WEIGHT_BYTES * (elements - linears)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline rank at its fullest."""

    parameters: Parameters
    """Those that train."""
    frozen: int
    """Elements that do not: no gradient, no state."""
    weights: float
    gradients: float
    optimizer: float
    """States that stay on the device."""
    optimizer_on_host: float
    activations: float
    """Kept on the device for backward, at the fullest moment of the schedule."""
    activations_on_host: float
    optimizer_step: float
    """Bytes worked on during the optimizer's step, when no activations are kept."""
    reserved: float

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer states on the device: the report's "all states"."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All on the device at the fullest moment: of the pipeline, or of the optimizer's step."""
        return self.states + max(self.activations, self.optimizer_step) + self.reserved


def optimizer_bytes(r: RunRequest, parameters: Parameters) -> float:
    """Bytes of one rank's ZeRO-1 shards of all states, wherever they are kept."""
    dense = MUON_STATE_BYTES * parameters.dense_muon + ADAMW_STATE_BYTES * parameters.adamw
    return dense / r.data_ranks + MUON_STATE_BYTES * parameters.expert_muon / r.expert_data_ranks


def optimizer_step_bytes(r: RunRequest, parameters: Parameters, *, has_dense_layer: bool) -> float:
    """Bytes one rank's step of MuonClip works on beside the states.

    See ``optimizer/sharded/optimizer.py``.
    Directions of two buckets in fp32, and of one bucket the matrices of one shape in the products,
    as ``tests/optimizer/sharded/test_memory.py`` finds them; with states on the host, those that
    visit: AdamW's for the whole step, Muon's in windows.
    """
    p = r.preset
    width = p.ffn_hidden_size if has_dense_layer else p.num_attention_heads * p.v_head_dim
    bucket = default_bucket_size(r.expert_data_ranks) / r.expert_data_ranks
    one_more = 2 * p.moe_ffn_hidden_size * p.hidden_size  # a bucket ends behind a whole weight
    experts = min(parameters.expert_muon / r.expert_data_ranks, bucket + one_more)
    batch = max(width * p.hidden_size, experts * 2 / 3)  # gate and up of three equal matrices
    visiting = 0.0
    if r.optimizer_offload:
        adamw = ADAMW_STATE_BYTES * parameters.adamw / r.data_ranks
        visiting = adamw * r.optimizer_offload + (AHEAD + 1) * WINDOW_BYTES
    return 2 * GRADIENT_BYTES * experts + BATCH_BYTES * batch + visiting


@dataclass(frozen=True)
class Activations:
    """Bytes of activations that a micro-batch keeps for backward."""

    on_device: float
    on_host: float


def layer_activations(r: RunRequest, *, is_moe: bool) -> Activations:
    """Bytes of one micro-batch and layer; a layer of which less can be moved moves what it can."""
    kept = r.tokens_per_microbatch * layer_bytes(
        r.preset,
        r.tp,
        is_moe=is_moe,
        recompute=r.recompute,
        fp8_storage=r.fp8_storage,
        modules=r.modules,
    )
    if r.lora_rank:
        kept += r.tokens_per_microbatch * kept_bytes(r.preset, r.lora_rank, is_moe=is_moe)
    packed = 0.0
    if r.document_tokens and r.modules == "transformer_engine":
        packed = r.tokens_per_microbatch * packed_attention_bytes(r.preset, r.tp, r.recompute)
    if not r.activation_offload:
        return Activations(kept + packed, 0.0)
    can = movable(r, is_moe=is_moe)
    moved = kept * min(r.activation_offload, can.part)
    return Activations(kept + packed - moved, moved * can.copies)


def chunk_activations(r: RunRequest, chunk: Chunk) -> Activations:
    """Bytes of one micro-batch and chunk, without the output head's."""
    kinds = {is_moe: layer_activations(r, is_moe=is_moe) for is_moe in (False, True)}
    layers = [kinds[layer >= r.preset.num_dense_layers] for layer in chunk.layers]
    return Activations(sum(a.on_device for a in layers), sum(a.on_host for a in layers))


def rank_activations(r: RunRequest, rank: int) -> Activations:
    """Bytes of a rank at the schedule's fullest moment; the head's never leave the device."""
    ours = [chunk for chunk in r.chunks() if chunk.rank == rank]
    device, host, head = [0.0] * r.vpp, [0.0] * r.vpp, 0.0
    for chunk in ours:
        kept = chunk_activations(r, chunk)
        device[chunk.virtual] += kept.on_device
        host[chunk.virtual] += kept.on_host
        if chunk.has_head:
            head = r.tokens_per_microbatch * head_bytes(r.preset, r.tp, r.modules)
    shape = ScheduleShape(r.pp, r.vpp, r.num_microbatches, r.has_overlap and r.vpp > 1)
    return Activations(head + peak_live(shape, rank, device), peak_live(shape, rank, host))


def rank_memory(r: RunRequest, rank: int, reserved_gb: float = RESERVED_GB) -> Memory:
    """All bytes on a GPU of pipeline rank ``rank``."""
    parameters = trained_parameters(r, rank)
    frozen = frozen_elements(r, rank)
    layers = [layer for chunk in r.chunks() if chunk.rank == rank for layer in chunk.layers]
    has_dense_layer = any(layer < r.preset.num_dense_layers for layer in layers)
    optimizer = optimizer_bytes(r, parameters)
    activations = rank_activations(r, rank)
    return Memory(
        parameters=parameters,
        frozen=frozen,
        weights=WEIGHT_BYTES * parameters.total + frozen_bytes(r, rank),
        gradients=GRADIENT_BYTES * parameters.total,
        optimizer=optimizer * (1 - r.optimizer_offload),
        optimizer_on_host=optimizer * r.optimizer_offload,
        activations=activations.on_device,
        activations_on_host=activations.on_host,
        optimizer_step=optimizer_step_bytes(r, parameters, has_dense_layer=has_dense_layer),
        reserved=reserved_gb * 1e9,
    )
