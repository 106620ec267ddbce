"""A whole run as frozen data, and as the flags that Megatron reads.

A recipe decides; this module only writes down. Architecture and optimizer are the preset's
(``flags/megatron.py``), layout and memory the planner's (``flags/layout.py``), schedule the
phase's, the program the stage's (``launch/stage.py``). The last flag of a name wins, so the order
of ``program_flags`` matters.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_k2.errors import UserError
from megatron_k2.flags.layout import layout_flags, memory_flags, speed_flags
from megatron_k2.launch.blend import DataBlend
from megatron_k2.launch.chat_blend import ChatBlend
from megatron_k2.launch.policies import CheckpointPolicy, ExpertDispatch, LossPolicy, Profiler
from megatron_k2.launch.stage import Pretraining, Stage
from megatron_k2.launch.task_data import TaskData
from megatron_k2.planning.phases import Phase
from megatron_k2.planning.request import RunRequest
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class Recipe:
    """One run of Megatron: everything that decides it, a source beside every number."""

    name: str
    layout: RunRequest
    """Preset, GPUs, parallel degrees, memory; sequence and batch are the phase's."""
    phase: Phase
    precision: Literal["bf16", "fp32"]
    checkpoint: CheckpointPolicy
    data: DataBlend | ChatBlend | TaskData
    loss: LossPolicy
    sources: tuple[tuple[str, str], ...]
    """(key as ``--set`` spells it, or its first part; where the value is from)."""
    differences: tuple[str, ...] = ()
    """Lines on what differs from the report, and why."""
    previous: str | None = None
    """The recipe whose last checkpoint this one starts from."""
    keeps_optimizer: bool = False
    """Take the previous run's optimizer state along with its weights."""
    imported: str | None = None
    """The published weights it continues from; ``--start-from`` says where they were imported."""
    stage: Stage = field(default_factory=Pretraining)
    """The kind of training, and what only it has."""
    dispatch: ExpertDispatch = field(default_factory=ExpertDispatch)
    profiler: Profiler = field(default_factory=Profiler)
    extra_flags: tuple[str, ...] = ()
    """Megatron's or ours; after all others, so they win."""

    def __post_init__(self) -> None:
        if (self.layout.seq_length, self.layout.sequences_per_step) != (
            self.phase.seq_length,
            self.phase.sequences_per_step,
        ):
            raise UserError(
                f"recipe {self.name}: the layout has {self.layout.sequences_per_step} x "
                f"{self.layout.seq_length} tokens a step, phase {self.phase.name} "
                f"{self.phase.sequences_per_step} x {self.phase.seq_length}"
            )
        self.dispatch.check(self.layout, is_cpu=self.is_cpu)
        self.profiler.check(self.layout.world_size, self.steps)

    @property
    def preset(self) -> ModelPreset:
        """The architecture, which the layout holds."""
        return self.layout.preset

    @property
    def is_cpu(self) -> bool:
        """Whether it runs without GPUs, and without the planner's figures."""
        return self.layout.gpu.name == "cpu"

    @property
    def steps(self) -> int:
        """Optimizer steps as Megatron counts them: whole batches within the phase's samples."""
        return self.phase.tokens // self.phase.seq_length // self.phase.sequences_per_step

    def program_flags(self, save: str, start_from: str | None = None) -> list[str]:
        """What follows ``megatron-k2 pretrain`` or another verb: the preset by name, the rest.

        Args:
            save: the run's directory; the same command resumes from it.
            start_from: the previous phase's, read only while ``save`` has no checkpoint. Megatron
                takes the weights from it, and the optimizer's state where the recipe keeps it;
                schedule and samples begin anew.
        """
        start = ["--pretrained-checkpoint", start_from] if start_from else []
        start += ["--keep-optimizer"] if start_from and self.keeps_optimizer else []
        return [
            *("--preset", self.preset.name),
            *(["--yarn"] if self.phase.has_yarn else []),
            *([] if self.is_cpu else ["--transformer-impl", "transformer_engine"]),
            *layout_flags(self.layout),
            *(self._speed_flags() if self.precision == "bf16" else []),
            *memory_flags(self.layout),
            *self.stage.schedule(self.phase),
            *self.dispatch.flags(),
            *self.data.flags(self.preset),
            *self.stage.flags(),
            *self.checkpoint.flags(),
            *self.loss.flags(),
            *self.profiler.flags(),
            # No split is held out by a recipe; SIGTERM saves and ends the run.
            *"--eval-iters 0 --exit-signal-handler".split(),
            *("--save", save),
            *start,
            *self.extra_flags,
        ]

    def _speed_flags(self) -> list[str]:
        return [flag for flag in speed_flags(self.layout) if flag not in self.stage.leaves_out]

    def to_megatron_args(self, save: str, start_from: str | None = None) -> list[str]:
        """The exact flag list: Megatron's own and those declared in ``flags/megatron.py``."""
        words = self.program_flags(save, start_from)
        return self.stage.program.expand(words, cuda=not self.is_cpu)

    def replace(self, **changes: object) -> "Recipe":
        """A copy in which the fields of ``changes`` have those values."""
        return replace(self, **changes)  # type: ignore[arg-type]
