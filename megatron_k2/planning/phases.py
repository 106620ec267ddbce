"""The report's training schedule as data: phases, learning rate at any token, Megatron's flags.

Kimi K2 report (arXiv:2507.20534), section 2.5: warm-up over 500 steps; 2e-4 up to 10T tokens;
cosine to 2e-5 over 5.5T more; then 400B tokens at 4k and 60B at 32k while the rate falls from 2e-5
to 7e-6; then YaRN to 128k. 67M tokens a step and weight decay 0.1 throughout.

Where the report is silent, our choices:

- 400B and 60B come after the 15.5T: the cosine ends where the annealing begins.
- From 2e-5 to 7e-6 the rate is linear in tokens: a line continues exactly over the change of
  sequence length, which is a restart for Megatron.
- YaRN is on in the last phase only, which keeps 7e-6 for 300 steps (20B tokens).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_k2.errors import UserError
from megatron_k2.presets import (
    K2_COSINE_TOKENS,
    K2_PRETRAIN_TOKENS,
    K2_TOKENS_PER_STEP,
    K2_WARMUP_STEPS,
    KIMI_K2,
)


@dataclass(frozen=True)
class Phase:
    """One run of Megatron: a data mixture, a sequence length, a piece of the rate's curve."""

    name: str
    source: str
    tokens: int
    seq_length: int
    """Tokens of one sequence."""
    tokens_per_step: int
    lr: float
    """At the end of the warm-up, or at the start where there is none."""
    min_lr: float
    """Learning rate at the phase's end."""
    shape: Literal["wsd", "linear", "constant"]
    """The curve; ``wsd``: warm-up, then constant, then a cosine at the end."""
    warmup_tokens: int = 0
    decay_tokens: int = 0
    """``wsd``: length of the cosine at the end."""
    has_yarn: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise UserError(
                f"phase {self.name}: a rate from lr={self.lr:g} to min_lr={self.min_lr:g}; "
                "expected lr above 0, and min_lr from 0 to lr"
            )
        if min(self.tokens, self.seq_length, self.tokens_per_step) < 1:
            raise UserError(
                f"phase {self.name}: tokens={self.tokens}, seq_length={self.seq_length}, "
                f"tokens_per_step={self.tokens_per_step}; each is expected above 0"
            )
        if self.tokens_per_step % self.seq_length:
            raise UserError(
                f"phase {self.name}: {self.tokens_per_step} tokens a step are not a multiple of "
                f"the sequence length {self.seq_length}"
            )
        if self.warmup_tokens + self.decay_tokens > self.tokens:
            raise UserError(
                f"phase {self.name}: warm-up and decay take "
                f"{self.warmup_tokens + self.decay_tokens} tokens of {self.tokens}"
            )

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one step, Megatron's global batch size."""
        return self.tokens_per_step // self.seq_length

    @property
    def steps(self) -> int:
        """Optimizer steps; the last may reach over the end, as in Megatron."""
        return -(-self.tokens // self.tokens_per_step)

    def lr_at(self, tokens: float) -> float:
        """Learning rate once ``tokens`` of this phase have been seen."""
        if tokens < self.warmup_tokens:
            return self.lr * tokens / self.warmup_tokens
        if self.shape == "constant":
            return self.lr
        start = self.tokens - self.decay_tokens if self.shape == "wsd" else 0
        if tokens <= start:
            return self.lr
        done = min(1.0, (tokens - start) / (self.tokens - start))
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "wsd" else 1 - done
        return self.min_lr + (self.lr - self.min_lr) * fall

    def megatron_flags(self) -> list[str]:
        """Sequence, batch and schedule; everything else is the preset's."""
        samples = self.tokens // self.seq_length
        flags = f"""
            --seq-length {self.seq_length} --max-position-embeddings {self.seq_length}
            --global-batch-size {self.sequences_per_step} --train-samples {samples}
            --lr {self.lr!r} --min-lr {self.min_lr!r} --lr-decay-samples {samples}
        """.split()
        if self.shape == "wsd":
            return [
                *flags,
                *"--lr-decay-style WSD --lr-wsd-decay-style cosine".split(),
                *f"--lr-warmup-samples {self.warmup_tokens // self.seq_length}".split(),
                *f"--lr-wsd-decay-samples {self.decay_tokens // self.seq_length}".split(),
            ]
        # A phase starts from the previous one's weights, at its own first step.
        return [*flags, *f"--lr-decay-style {self.shape} --lr-warmup-samples 0".split()]


def kimi_k2_phases() -> tuple[Phase, ...]:
    """The four phases of report 2.5, in order; the first is the preset's own schedule."""
    pretrain, last_lr = KIMI_K2.training, 7e-6
    anneal, long_context = 400 * 10**9, 60 * 10**9
    fall = (pretrain.min_lr - last_lr) / (anneal + long_context)
    return (
        Phase(
            name="pretrain",
            source="report 2.5: 500 steps of warm-up, 10T tokens in all at 2e-4, cosine over 5.5T",
            tokens=K2_PRETRAIN_TOKENS,
            seq_length=pretrain.seq_length,
            tokens_per_step=K2_TOKENS_PER_STEP,
            lr=pretrain.lr,
            min_lr=pretrain.min_lr,
            shape="wsd",
            warmup_tokens=K2_WARMUP_STEPS * K2_TOKENS_PER_STEP,
            decay_tokens=K2_COSINE_TOKENS,
        ),
        Phase(
            name="anneal-4k",
            source="report 2.5: 400B tokens at 4k; linear is our choice",
            tokens=anneal,
            seq_length=pretrain.seq_length,
            tokens_per_step=K2_TOKENS_PER_STEP,
            lr=pretrain.min_lr,
            min_lr=pretrain.min_lr - fall * anneal,
            shape="linear",
        ),
        Phase(
            name="long-32k",
            source="report 2.5: 60B tokens at 32k, down to 7e-6; without YaRN is our choice",
            tokens=long_context,
            seq_length=32768,
            tokens_per_step=K2_TOKENS_PER_STEP,
            lr=pretrain.min_lr - fall * anneal,
            min_lr=last_lr,
            shape="linear",
        ),
        Phase(
            name="yarn-128k",
            source="report 2.5: YaRN to 128k; length and rate are our choice",
            tokens=300 * K2_TOKENS_PER_STEP,
            seq_length=131072,
            tokens_per_step=K2_TOKENS_PER_STEP,
            lr=last_lr,
            min_lr=last_lr,
            shape="constant",
            has_yarn=True,
        ),
    )


def scaled_down(
    phases: tuple[Phase, ...],
    *,
    steps: int,
    seq_length: int,
    sequences_per_step: int,
    lr: float,
) -> tuple[Phase, ...]:
    """The same curve over a small run: every length shrinks alike, and stays a whole step.

    Args:
        phases: to be scaled.
        steps: of the longest phase; the others keep their ratio to it and have at least four.
        seq_length: of the first phase, tokens; later ones keep their ratio to it.
        sequences_per_step: of the first phase; tokens a step are then the same throughout.
        lr: the highest learning rate.
    """
    first = phases[0]
    factor = steps / max(phase.steps for phase in phases)
    step = seq_length * sequences_per_step
    longest = max(phase.seq_length for phase in phases) * seq_length // first.seq_length
    if step % longest:
        raise UserError(
            f"{sequences_per_step} sequences of {seq_length} a step are not a multiple of the "
            f"last phase's {longest} tokens; take a multiple of {longest // seq_length} sequences"
        )

    def whole_steps(tokens: int, at_least: int) -> int:
        return step * max(at_least, round(tokens / first.tokens_per_step * factor))

    def small(phase: Phase) -> Phase:
        tokens = whole_steps(phase.tokens, 4)
        warmup = whole_steps(phase.warmup_tokens, 1) if phase.warmup_tokens else 0
        decay = whole_steps(phase.decay_tokens, 1) if phase.decay_tokens else 0
        return replace(
            phase,
            tokens=tokens,
            seq_length=phase.seq_length * seq_length // first.seq_length,
            tokens_per_step=step,
            lr=phase.lr * lr / first.lr,
            min_lr=phase.min_lr * lr / first.lr,
            warmup_tokens=warmup,
            decay_tokens=min(decay, tokens - warmup),
        )

    return tuple(map(small, phases))
