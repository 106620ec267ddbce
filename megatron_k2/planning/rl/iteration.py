"""An iteration's seconds, tokens and GPU-hours: what follows on what, and what overlaps.

On one cluster of GPUs the phases of ``rl/loop.py`` come one after another: states to host memory,
weights to the engines, weights to host memory, sampling, both back, pi_old, the steps. Verifiers
and judges work while others are still sampled. On nodes of their own engines need no moving, but
the loop is on-policy: they wait while the trainer trains, and it waits while they sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_k2.planning.cost.memory import RESERVED_GB
from megatron_k2.planning.estimate import Assumptions, Estimate, chunk_costs, estimate
from megatron_k2.planning.rl.decode import Replica, replica
from megatron_k2.planning.rl.memory import (
    ENGINE_RESIDUE_GB,
    TRAINER_RESIDUE_GB,
    RlMemory,
    held,
)
from megatron_k2.planning.rl.request import RlRequest
from megatron_k2.planning.rl.simulate import Rollout, Simulation
from megatron_k2.planning.update import weight_update

PACK_FILL = 0.95
"""Rows of packs that hold tokens: answers are never cut. Ours."""
RUBRIC_TOKENS = 500
"""Of a comparison beside the prompt and both answers: rubrics and instruction. Ours."""
WARM_UP = 2
"""Iterations until answers that were cut off are as many as they stay."""
SHOWN = 3
"""Iterations that a figure is the mean of."""


@dataclass(frozen=True)
class Part:
    """One phase of an iteration."""

    name: str
    seconds: float


@dataclass(frozen=True)
class RlPlan:
    """One iteration."""

    request: RlRequest
    memory: RlMemory
    step: Estimate
    """Of an optimizer step over packs as full as they are on average."""
    rates: Replica
    rollouts: tuple[Rollout, ...]
    """Sampled iterations, the last of which is shown."""
    waited: tuple[Rollout, ...]
    """The same with every answer waited for: without partial rollouts."""
    parts: tuple[Part, ...]
    judge_tokens: float
    judge_seconds: float
    """Of all replicas, reading; hidden where engines have idle slots."""

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        return sum(part.seconds for part in self.parts)

    @property
    def rollout_seconds(self) -> float:
        """Of the sampling."""
        return mean_seconds(self.rollouts)

    @property
    def waited_seconds(self) -> float:
        """Of an iteration in which every answer is waited for."""
        return self.seconds + mean_seconds(self.waited) - self.rollout_seconds

    @property
    def gpu_hours(self) -> float:
        """Of an iteration, all GPUs of the allocation counted."""
        return self.seconds * self.request.world_size / 3600

    @property
    def busy(self) -> float:
        """Part of the engines' slots that decode while they sample."""
        slots = self.request.engines.replicas * self.request.engines.slots
        return sum(r.busy(slots) for r in self.rollouts) / len(self.rollouts)


def mean_seconds(rollouts: Sequence[Rollout]) -> float:
    """Of the sampling of iterations."""
    return sum(each.seconds for each in rollouts) / len(rollouts)


def reserved_gb(r: RlRequest, assumed: float = RESERVED_GB) -> float:
    """What the trainer's memory leaves free: its own and, on the same GPUs, the engine's residue.

    ``memory_fit.fit_to_memory`` is to be asked with it.
    """
    beside = ENGINE_RESIDUE_GB if r.engines.is_colocated else 0.0
    return max(assumed, TRAINER_RESIDUE_GB) + beside


def packs_per_step(r: RlRequest) -> int:
    """Packs that the answers of an optimizer step fill, as many on every data-parallel rank."""
    filled = r.trainer.seq_length * PACK_FILL
    unit = r.trainer.data_parallel * (r.trainer.pp if r.trainer.vpp > 1 else 1)
    return math.ceil(r.tokens / r.mini_batches / filled / unit) * unit


def plan_iteration(r: RlRequest, a: Assumptions | None = None, seed: int = 0) -> RlPlan:
    """Memory, seconds and tokens of an iteration, whether it fits (``fit.plan_memory``) or not.

    Args:
        r: the run.
        a: parts of the data sheets' rates.
        seed: of the simulated lengths.

    Raises:
        UserError: for a trainer that cannot be laid out.
    """
    a = a or Assumptions()
    memory = held(r, a.reserved_gb)
    rates = replica(r.trainer.preset, r.trainer.gpu, r.engines, a)
    packs = r.trainer.replace(
        sequences_per_step=packs_per_step(r), document_tokens=r.lengths.document_tokens
    )
    step = estimate(packs, a)
    rollouts = sampled(r, rates, r.groups_in_play, seed)
    judge_tokens = tokens_of_judges(r)
    length = r.lengths.prompt + 2 * r.lengths.mean
    judge_seconds = rates.prompt_seconds(judge_tokens / r.engines.replicas, length)
    parts = _parts(r, memory, step, mean_seconds(rollouts), a)
    return RlPlan(
        request=r,
        memory=memory,
        step=step,
        rates=rates,
        rollouts=rollouts,
        waited=sampled(r, rates, r.groups, seed),
        parts=parts,
        judge_tokens=judge_tokens,
        judge_seconds=judge_seconds,
    )


def sampled(r: RlRequest, rates: Replica, in_play: int, seed: int) -> tuple[Rollout, ...]:
    """``SHOWN`` iterations behind the first few."""
    run = Simulation(rates, r.engines.replicas, r.lengths, r.groups, r.group_size, in_play, seed)
    first = WARM_UP if in_play > r.groups else 0
    return tuple(run.iteration() for _ in range(first + SHOWN))[first:]


def tokens_of_judges(r: RlRequest, judged: float | None = None) -> float:
    """Tokens that judges read: every pair of a group in both orders (``rewards/rubric.py``).

    Args:
        r: the run.
        judged: part of the groups; ``None``: the run's.
    """
    comparison = r.lengths.prompt + 2 * r.lengths.mean + RUBRIC_TOKENS
    part = r.judged if judged is None else judged
    return part * r.groups * r.group_size * (r.group_size - 1) * comparison


def _parts(
    r: RlRequest, memory: RlMemory, step: Estimate, rollout: float, a: Assumptions
) -> tuple[Part, ...]:
    gpu, train = r.trainer.gpu, memory.train
    host = gpu.pcie_gb_per_s * 1e9 * a.part("host")
    moves = r.engines.is_colocated
    update = weight_update(r.trainer.preset, gpu, r.world_size, a, is_fp8=r.engines.is_fp8)
    return (
        Part("states to host", train.optimizer / host if moves else 0.0),
        Part("update", update.seconds),
        Part("weights to host", train.weights / host if moves else 0.0),
        Part("rollout", rollout),
        Part("back to GPU", (train.optimizer + train.weights) / host if moves else 0.0),
        Part("pi_old", r.mini_batches * forward_seconds(step, a)),
        Part("train", r.mini_batches * step.step_seconds),
    )


def forward_seconds(step: Estimate, a: Assumptions) -> float:
    """A step's packs forward only: their part of its pipeline, as of its arithmetic."""
    costs = chunk_costs(step.request, a)
    forward = sum(cost.attention_forward + cost.mlp_forward for cost in costs)
    backward = sum(
        cost.attention_backward + cost.mlp_backward + cost.weight_gradients for cost in costs
    )
    return (step.step_seconds - step.optimizer_seconds) * forward / (forward + backward)


def starts(parts: Sequence[Part]) -> list[float]:
    """Of each part, seconds into the iteration."""
    return [0.0, *accumulate(part.seconds for part in parts)][:-1]
