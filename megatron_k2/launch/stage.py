"""What differs between kinds of training: the program, and flags that only one of them has.

Layout, schedule, checkpoints and the answer to a bad loss are the same for all (``recipe.py``).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_k2.launch.policies import check_choice
from megatron_k2.sft.train import SFT
from megatron_k2.training.pretrain import PRETRAIN, Program


@dataclass(frozen=True)
class Pretraining:
    """On text, every token a target."""

    program: ClassVar[Program] = PRETRAIN
    module: ClassVar[str] = "megatron_k2.training.pretrain"
    script: ClassVar[str] = "examples/pretrain_k2.py"

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

    def flags(self) -> list[str]:
        """Of the loss."""
        return ["--sft-loss", self.average]

    def described(self) -> str:
        """The loss in words, for the launch table."""
        return f"mean over {'targets' if self.average == 'token' else 'samples'} of a step"


type Stage = Pretraining | FineTuning
