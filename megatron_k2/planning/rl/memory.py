"""Bytes on one GPU, and of the host's memory behind it, in each phase of an iteration.

Three phases follow one another. **train**: the trainer is awake, engines on the same GPUs asleep.
**update**: gradients are freed and the optimizer's states are in host memory; the trainer's weights
stay, for engines take theirs from them, bucket by bucket. **rollout**: the trainer's weights are in
host memory too, and what is left of the GPU is the engine's cache of latents.

What sleeps keeps something: communicators above all. Peers measure 7 to 10 GB a rank; none of it
was measured here, so each such figure is a constant with a name below.
"""

from dataclasses import dataclass, fields
from typing import Literal

from megatron_k2.errors import UserError
from megatron_k2.planning.cost.memory import (
    ADAMW_STATE_BYTES,
    BLOCK_FP8_BYTES,
    GRADIENT_BYTES,
    MUON_STATE_BYTES,
    RESERVED_GB,
    WEIGHT_BYTES,
    Parameters,
    layer_parameters,
    rank_memory,
    trained_parameters,
)
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.rl.request import EngineLayout, RlRequest
from megatron_k2.presets import ModelPreset

TRAINER_RESIDUE_GB = 8.5
"""What a trainer's rank keeps on the GPU while it sleeps: NCCL's communicators with their buffers
and the CUDA context. Assumption: the middle of the 7 to 10 GB a rank that peers measure."""
ENGINE_RESIDUE_GB = 3.0
"""What an engine keeps at sleep level 2: context, communicators, captured graphs. Assumption."""
ENGINE_WORKSPACE_GB = 6.0
"""What an engine needs beside weights and cache while awake, the residue included: a chunk of
prompts' activations, buffers of the experts' all-to-all. Assumption."""
BUCKET_BYTES = 2 * 256 * 2**20
"""An update's: one bucket being filled, one being read (``weight_sync/source.py``)."""
LATENT_BYTES = 2
"""Of an element of the cache: bf16."""

type PhaseName = Literal["train", "update", "rollout"]


@dataclass(frozen=True)
class StateBytes:
    """Bytes an element takes, by the precision that a run trains in."""

    weights: int
    gradients: int
    muon: int
    adamw: int


STATES = {
    "bf16": StateBytes(WEIGHT_BYTES, GRADIENT_BYTES, MUON_STATE_BYTES, ADAMW_STATE_BYTES),
    # The weights themselves are what the optimizer steps: no master beside them.
    "fp32": StateBytes(4, 4, 4, 8),
}


@dataclass(frozen=True)
class TrainerBytes:
    """What one rank holds between steps; activations are gone by then."""

    weights: float
    gradients: float
    optimizer: float


def trainer_bytes(
    parameters: Parameters,
    precision: Literal["bf16", "fp32"],
    *,
    data_ranks: int = 1,
    expert_data_ranks: int = 1,
) -> TrainerBytes:
    """Of a rank that trains all of ``parameters``.

    Args:
        parameters: elements of the rank.
        precision: of the run.
        data_ranks: that share a dense parameter's state: ZeRO-1's; 1 without it.
        expert_data_ranks: likewise an expert's.
    """
    each = STATES[precision]
    dense = each.muon * parameters.dense_muon + each.adamw * parameters.adamw
    return TrainerBytes(
        weights=each.weights * parameters.total,
        gradients=each.gradients * parameters.total,
        optimizer=dense / data_ranks + each.muon * parameters.expert_muon / expert_data_ranks,
    )


@dataclass(frozen=True)
class Held:
    """Bytes in one phase: of a GPU, and of its part of the host's memory."""

    phase: PhaseName
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    """Or what the optimizer's step works on, where that is more."""
    engine_weights: float = 0.0
    cache: float = 0.0
    buckets: float = 0.0
    reserved: float = 0.0
    """Of whoever is awake."""
    residue: float = 0.0
    """Of whoever sleeps."""
    on_host: float = 0.0

    @property
    def total(self) -> float:
        """On the GPU."""
        return sum(getattr(self, name) for name in ON_GPU)


ON_GPU = tuple(field.name for field in fields(Held) if field.name not in ("phase", "on_host"))
"""Fields of ``Held`` that are on the GPU."""


@dataclass(frozen=True)
class EngineWeights:
    """Bytes of a GPU of a replica."""

    whole: float
    """What every token reads: attention, dense layers, shared experts, embedding and head."""
    experts: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.whole + self.experts


def engine_weights(p: ModelPreset, engines: EngineLayout) -> EngineWeights:
    """Of a GPU; of the embedding, which the first and the last layer need, all is counted."""
    ep = max(1, engines.gpus)
    if p.num_moe_experts % ep:
        raise UserError(
            f"{p.num_moe_experts} experts on a replica of {ep} GPUs: expected a number that "
            "divides them; change engines.nodes_per_replica"
        )
    found = Parameters(0, 0, 2 * (p.vocab_size // engines.tp) * p.hidden_size + p.hidden_size)
    for layer in range(p.num_layers):
        is_moe = layer >= p.num_dense_layers
        found += layer_parameters(p, is_moe=is_moe, tp=engines.tp, ep=ep)
    routers = p.num_moe_layers * p.num_moe_experts * p.hidden_size
    rate = BLOCK_FP8_BYTES if engines.is_fp8 else WEIGHT_BYTES
    others = WEIGHT_BYTES * (found.adamw + routers)
    return EngineWeights(rate * (found.dense_muon - routers) + others, rate * found.expert_muon)


def latent_bytes(p: ModelPreset) -> int:
    """A token's in the cache: the latent and the rotary key of every layer."""
    return LATENT_BYTES * p.num_layers * (p.kv_lora_rank + p.qk_pos_emb_head_dim)


@dataclass(frozen=True)
class RlMemory:
    """An iteration's phases, and how far the cache reaches."""

    train: Held
    update: Held
    rollout: Held
    cache_tokens: int
    """That one group of a replica's GPUs holds."""
    memory_part: float
    """Of a GPU's memory that an engine may take, awake."""

    @property
    def phases(self) -> tuple[Held, ...]:
        """In order."""
        return (self.train, self.update, self.rollout)


def held(r: RlRequest, reserved_gb: float = RESERVED_GB) -> RlMemory:
    """The phases, whether they fit or not."""
    e, t = r.engines, r.trainer
    weights = engine_weights(t.preset, e)
    awake = max(reserved_gb, TRAINER_RESIDUE_GB) * 1e9
    fullest = max((rank_memory(t, rank, 0.0) for rank in range(t.pp)), key=lambda m: m.total)
    states = fullest.optimizer + fullest.optimizer_on_host
    beside = ENGINE_RESIDUE_GB * 1e9 if e.is_colocated else 0.0
    own = TRAINER_RESIDUE_GB * 1e9 if e.is_colocated else 0.0
    train = Held(
        "train",
        weights=fullest.weights,
        gradients=fullest.gradients,
        optimizer=fullest.optimizer,
        activations=max(fullest.activations, fullest.optimizer_step),
        reserved=awake,
        residue=beside,
        on_host=fullest.optimizer_on_host + fullest.activations_on_host,
    )
    update = Held(
        "update",
        weights=fullest.weights if e.is_colocated else 0.0,
        engine_weights=weights.total,
        buckets=BUCKET_BYTES,
        reserved=ENGINE_WORKSPACE_GB * 1e9,
        residue=own,
        on_host=states if e.is_colocated else 0.0,
    )
    fixed = weights.total + ENGINE_WORKSPACE_GB * 1e9 + own
    cache = max(0.0, t.gpu.memory_gb * 1e9 - fixed)
    rollout = Held(
        "rollout",
        engine_weights=weights.total,
        cache=cache,
        reserved=ENGINE_WORKSPACE_GB * 1e9,
        residue=own,
        on_host=states + fullest.weights if e.is_colocated else 0.0,
    )
    part = 1 - own / (t.gpu.memory_gb * 1e9)
    return RlMemory(train, update, rollout, int(cache / latent_bytes(t.preset)), part)


def trainer_layout(
    r: RunRequest, rank: int, precision: Literal["bf16", "fp32"], *, is_zero: bool = True
) -> TrainerBytes:
    """What a GPU of a pipeline rank holds between steps; real ranks are counted in tests.

    Args:
        r: the layout.
        rank: of the pipeline.
        precision: of the run.
        is_zero: whether states are split over data-parallel ranks.
    """
    return trainer_bytes(
        trained_parameters(r, rank),
        precision,
        data_ranks=r.data_ranks if is_zero else 1,
        expert_data_ranks=r.expert_data_ranks if is_zero else 1,
    )
