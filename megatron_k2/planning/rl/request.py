"""What a run of reinforcement learning asks for, in the planner's terms."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_k2.errors import UserError
from megatron_k2.planning.gpus import GPUS_PER_NODE
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.rl.lengths import Lengths

type Backend = Literal["local", "vllm", "sglang"]


@dataclass(frozen=True)
class Embedded:
    """The engine in rank 0's own process: nothing is started, met or planned."""


@dataclass(frozen=True)
class EngineLayout:
    """Servers that answer while the model trains.

    Experts are spread over all GPUs of a replica; attention is split over ``tp`` of them, and each
    such group has answers of its own (data parallel attention).

    Raises:
        UserError: counts that do not go together.
    """

    replicas: int
    nodes_per_replica: int
    gpus_per_node: int = GPUS_PER_NODE
    """0: on the CPU."""
    tp: int = 1
    """GPUs that an answer's attention is split over; each holds all of its cache."""
    backend: Backend = "vllm"
    is_colocated: bool = True
    """On the trainer's GPUs, asleep while it trains; else on nodes of their own."""
    is_fp8: bool = True
    """Weights in block FP8, else in bf16."""
    slots: int = 256
    """Answers that a replica decodes at once."""

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend.__value__):
            known = ", ".join(get_args(Backend.__value__))
            raise UserError(f"engines.backend={self.backend}: expected one of {known}")
        if min(self.replicas, self.nodes_per_replica, self.tp, self.slots) < 1:
            raise UserError(f"{self}: expected 1 or more of each")
        if self.gpus_per_node and self.gpus_per_node % self.tp:
            raise UserError(
                f"engines.tp={self.tp} does not divide the {self.gpus_per_node} GPUs of a node; "
                "attention is split within one"
            )
        if self.slots % self.groups:
            raise UserError(
                f"engines.slots={self.slots}: expected a multiple of the {self.groups} groups of "
                f"{self.tp} GPUs that a replica has"
            )

    @property
    def gpus(self) -> int:
        """Of a replica."""
        return self.nodes_per_replica * self.gpus_per_node

    @property
    def nodes(self) -> int:
        """Of all replicas."""
        return self.replicas * self.nodes_per_replica

    @property
    def groups(self) -> int:
        """Of a replica, each with answers of its own."""
        return max(1, self.gpus // self.tp)

    def replace(self, **changes: object) -> "EngineLayout":
        """A copy in which the fields of ``changes`` have those values."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RlRequest:
    """One run: what trains, what answers, and how much an iteration samples.

    Raises:
        UserError: engines that are not on the GPUs they are said to be on.
    """

    trainer: RunRequest
    """``sequences_per_step`` answers a step; each at most a pack."""
    engines: EngineLayout
    lengths: Lengths
    group_size: int
    mini_batches: int
    groups_in_play: int
    judged: float = 0.0
    """Part of the groups that the model judges by rubrics, every pair in both orders."""

    def __post_init__(self) -> None:
        e, world = self.engines, self.trainer.world_size
        if e.is_colocated and e.replicas * e.gpus != world:
            raise UserError(
                f"{e.replicas} replicas of {e.gpus} GPUs on the trainer's {world}: expected "
                f"replicas x nodes x GPUs to be as many; {max(1, world // max(1, e.gpus))} fit, or "
                "is_colocated=false"
            )
        if not 0 <= self.judged <= 1:
            raise UserError(f"judged={self.judged}: a part from 0 to 1 is expected")

    @property
    def answers(self) -> int:
        """Of an iteration."""
        return self.trainer.sequences_per_step * self.mini_batches

    @property
    def groups(self) -> int:
        """Whole ones, that end an iteration."""
        return self.answers // self.group_size

    @property
    def tokens(self) -> float:
        """Of an iteration, prompts included: what is trained on."""
        return self.answers * (self.lengths.prompt + self.lengths.mean)

    @property
    def world_size(self) -> int:
        """GPUs of the allocation."""
        own = 0 if self.engines.is_colocated else self.engines.replicas * self.engines.gpus
        return self.trainer.world_size + own

    def replace(self, **changes: object) -> "RlRequest":
        """A copy in which the fields of ``changes`` have those values."""
        return replace(self, **changes)  # type: ignore[arg-type]
