"""What differs between kinds of training: the program, its way to count, flags that only it has.

Layout, checkpoints and the answer to a bad loss are the same for all (``recipe.py``).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron_k2.errors import UserError
from megatron_k2.launch.policies import check_choice
from megatron_k2.planning.phases import Phase
from megatron_k2.planning.rl.lengths import Lengths
from megatron_k2.planning.rl.request import Embedded, EngineLayout
from megatron_k2.rl.checks import REFUSED
from megatron_k2.rl.train import RL
from megatron_k2.sft.train import SFT
from megatron_k2.training.pretrain import PRETRAIN, Program


@dataclass(frozen=True)
class Pretraining:
    """On text, every token a target."""

    program: ClassVar[Program] = PRETRAIN
    module: ClassVar[str] = "megatron_k2.training.pretrain"
    script: ClassVar[str] = "examples/pretrain_k2.py"
    leaves_out: ClassVar[frozenset[str]] = frozenset()

    def schedule(self, phase: Phase) -> list[str]:
        """As Megatron counts."""
        return phase.megatron_flags()

    def flags(self) -> list[str]:
        """None of its own."""
        return []

    def described(self) -> str:
        """The loss in words, for the launch table."""
        return "mean over all tokens"


type Average = Literal["token", "sample"]


@dataclass(frozen=True)
class FineTuning:
    """On packed dialogues, of which an assistant's tokens are targets."""

    program: ClassVar[Program] = SFT
    module: ClassVar[str] = "megatron_k2.sft.train"
    script: ClassVar[str] = "examples/sft_k2.py"
    leaves_out: ClassVar[frozenset[str]] = frozenset()

    average: Average = "token"
    """What the loss is a mean over: the targets of a global batch, or its samples."""

    def __post_init__(self) -> None:
        check_choice("stage.average", self.average, Average.__value__)

    def schedule(self, phase: Phase) -> list[str]:
        """As Megatron counts."""
        return phase.megatron_flags()

    def flags(self) -> list[str]:
        """Of the loss."""
        return ["--sft-loss", self.average]

    def described(self) -> str:
        """The loss in words, for the launch table."""
        return f"mean over {'targets' if self.average == 'token' else 'samples'} of a step"


@dataclass(frozen=True)
class ReinforcementLearning:
    """On answers that the model samples; a sequence of a phase's batch is an answer.

    What a phase calls its tokens is therefore the most that answers and prompts may have; its steps
    are optimizer steps, ``mini_batches`` an iteration.
    """

    program: ClassVar[Program] = RL
    module: ClassVar[str] = "megatron_k2.rl.train"
    script: ClassVar[str] = "examples/rl_k2.py"
    leaves_out: ClassVar[frozenset[str]] = frozenset(REFUSED)

    group_size: int = 8
    """Answers to a prompt."""
    mini_batches: int = 1
    """Optimizer steps an iteration."""
    groups_in_play: int = 0
    """Prompts at once; more than end an iteration let long answers go on in the next. 0: half as
    many again."""
    engines: Embedded | EngineLayout = field(default_factory=Embedded)
    """What answers: rank 0 itself, or servers beside the trainer (``launch/rl_slurm.py``)."""
    prompt_tokens: int = 1024
    """Of a mean prompt; this and what follows are the planner's alone."""
    median_tokens: int = 4096
    """Of an answer."""
    sigma: float = 1.0
    """Standard deviation of the logarithm of an answer's length."""
    judged: float = 0.0
    """Part of the groups that the model judges by rubrics; task sets say which."""

    def prompts(self, phase: Phase) -> int:
        """That end an iteration.

        Raises:
            UserError: a batch that is not whole groups, or a rate that is not constant.
        """
        answers = phase.sequences_per_step * self.mini_batches
        if self.mini_batches < 1 or phase.steps % self.mini_batches:
            raise UserError(
                f"stage.mini_batches={self.mini_batches} and {phase.steps} steps: expected a "
                "number that divides them"
            )
        if self.group_size < 1 or phase.sequences_per_step % self.group_size:
            raise UserError(
                f"stage.group_size={self.group_size} and {phase.sequences_per_step} answers a "
                "step: expected a number that divides them (phase.tokens_per_step / "
                "phase.seq_length)"
            )
        if phase.shape != "constant":
            raise UserError(f"phase {phase.name}: shape {phase.shape}; expected constant")
        return answers // self.group_size

    def in_play(self, phase: Phase) -> int:
        """Prompts at once, as ``rl/side.plan_of`` has them."""
        prompts = self.prompts(phase)
        return self.groups_in_play or prompts + prompts // 2

    def lengths(self, phase: Phase) -> Lengths:
        """Of prompts and answers, as planned; both together fit a pack."""
        most = phase.seq_length - self.prompt_tokens
        return Lengths(self.median_tokens, self.sigma, most, self.prompt_tokens)

    def schedule(self, phase: Phase) -> list[str]:
        """In iterations and prompts.

        Raises:
            UserError: see ``prompts``.
        """
        prompts = self.prompts(phase)
        return f"""
            --seq-length {phase.seq_length} --max-position-embeddings {phase.seq_length}
            --iterations {phase.steps // self.mini_batches} --prompts-per-iteration {prompts}
            --mini-batches {self.mini_batches} --lr {phase.lr!r} --min-lr {phase.min_lr!r}
        """.split()

    def flags(self) -> list[str]:
        """Of the sampling."""
        flags = ["--group-size", str(self.group_size)]
        if self.groups_in_play:
            flags += ["--groups-in-play", str(self.groups_in_play)]
        if isinstance(self.engines, EngineLayout):
            flags += ["--engine-slots", str(self.engines.replicas * self.engines.slots)]
            flags += ["--offload-in-rollout"] if self.engines.is_colocated else []
        return flags

    def described(self) -> str:
        """What is learnt from, in words, for the launch table."""
        return f"rewards against the mean of {self.group_size} answers"


type Stage = Pretraining | FineTuning | ReinforcementLearning
