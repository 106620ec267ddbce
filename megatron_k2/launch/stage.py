"""What differs between kinds of training: the program, its way to count, flags that only it has.

Layout, checkpoints and the answer to a bad loss are the same for all (``recipe.py``).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_k2.errors import UserError
from megatron_k2.launch.policies import check_choice
from megatron_k2.planning.phases import Phase
from megatron_k2.rl.train import RL
from megatron_k2.sft.train import SFT
from megatron_k2.training.pretrain import PRETRAIN, Program


@dataclass(frozen=True)
class Pretraining:
    """On text, every token a target."""

    program: ClassVar[Program] = PRETRAIN
    module: ClassVar[str] = "megatron_k2.training.pretrain"
    script: ClassVar[str] = "examples/pretrain_k2.py"

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
    """On answers that the model samples; a step an iteration, a sequence of its batch an answer.

    What a phase calls its tokens is therefore the most that answers and prompts may have.
    """

    program: ClassVar[Program] = RL
    module: ClassVar[str] = "megatron_k2.rl.train"
    script: ClassVar[str] = "examples/rl_k2.py"

    group_size: int = 8
    """Answers to a prompt."""

    def schedule(self, phase: Phase) -> list[str]:
        """In iterations and prompts.

        Raises:
            UserError: a batch that is not whole groups, or a rate that is not constant.
        """
        answers = phase.sequences_per_step
        if self.group_size < 1 or answers % self.group_size:
            raise UserError(
                f"stage.group_size={self.group_size} and {answers} answers a step: expected a "
                "number that divides them (phase.tokens_per_step / phase.seq_length)"
            )
        if phase.shape != "constant":
            raise UserError(f"phase {phase.name}: shape {phase.shape}; expected constant")
        return f"""
            --seq-length {phase.seq_length} --max-position-embeddings {phase.seq_length}
            --iterations {phase.steps} --prompts-per-iteration {answers // self.group_size}
            --lr {phase.lr!r} --min-lr {phase.min_lr!r}
        """.split()

    def flags(self) -> list[str]:
        """Of the sampling."""
        return ["--group-size", str(self.group_size)]

    def described(self) -> str:
        """What is learnt from, in words, for the launch table."""
        return f"rewards against the mean of {self.group_size} answers"


type Stage = Pretraining | FineTuning | ReinforcementLearning
