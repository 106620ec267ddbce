"""Which linears get adapters, of what rank and scale; no torch, so that flags can be checked early.

LoRA (arXiv:2106.09685): a frozen weight W [out, in] is used as ``W + (alpha / rank) B A`` with A
[rank, in] and B [out, rank]. Names of targets are Megatron's. The router is never one: its scores
choose which experts, and so whose adapters, a token trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.errors import UserError

ATTENTION_TARGETS = (
    *("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"),
    *("linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"),
)
MLP_TARGETS = ("linear_fc1", "linear_fc2")
"""Of the dense layers, the shared experts and the routed experts: all three, or one by its name."""
PLACES = ("mlp", "shared_experts", "experts")
TARGETS = (*ATTENTION_TARGETS, *(f"{place}.{name}" for place in PLACES for name in MLP_TARGETS))
"""Every linear that an adapter may stand beside; ``linear_q_proj`` is that of models whose query
has no latent, ``mlp`` the dense layers'."""


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of a model."""

    rank: int
    """Rows of A, columns of B."""
    alpha: float
    """The product of B and A counts ``alpha / rank`` times."""
    targets: frozenset[str] = frozenset(TARGETS)
    """Members of ``TARGETS``."""
    dropout: float = 0.0
    """Share of an adapter's input that training sets to zero."""
    seed: int = 1234
    """Of A's first values; B begins as zeros."""
    base: str | None = None
    """The ``iter_*`` directory of the frozen weights; None: they stay as they were initialised."""
    holds_fp8: bool = False
    """Whether the frozen linears are held in block FP8 (``fp8/frozen.py``)."""

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by, once."""
        return self.alpha / self.rank


def parse_targets(words: Sequence[str]) -> frozenset[str]:
    """Targets by name; ``linear_fc1`` and ``linear_fc2`` alone stand for all three places.

    Raises:
        UserError: for a name that is no linear of the model, the router's among them.
    """
    found: set[str] = set()
    for word in words:
        if word in MLP_TARGETS:
            found.update(f"{place}.{word}" for place in PLACES)
        elif word in TARGETS:
            found.add(word)
        elif "router" in word:
            raise UserError(
                f"--lora-targets {word}: the router stays as it is, since an adapter there would "
                f"change which experts' adapters are trained; expected of: {', '.join(TARGETS)}"
            )
        else:
            raise UserError(f"--lora-targets {word}: expected of: {', '.join(TARGETS)}")
    if not found:
        raise UserError(f"--lora-targets: expected at least one of: {', '.join(TARGETS)}")
    return frozenset(found)


def settings_of(
    rank: int,
    alpha: float | None,
    targets: Sequence[str] | None,
    dropout: float,
    *,
    seed: int = 1234,
    base: str | None = None,
    holds_fp8: bool = False,
) -> LoraSettings:
    """What the flags ask for.

    Args:
        rank: at least 1.
        alpha: above 0; None: twice the rank (Hugging Face's recipes; the K2 report has no LoRA).
        targets: names; None: every linear.
        dropout: from 0, below 1.
        seed: of A.
        base: the frozen weights' directory.
        holds_fp8: whether they are held in block FP8.

    Raises:
        UserError: naming the flag.
    """
    if rank < 1:
        raise UserError(f"--lora-rank {rank}: expected at least 1")
    alpha = 2.0 * rank if alpha is None else alpha
    if not alpha > 0:
        raise UserError(f"--lora-alpha {alpha:g}: expected a number above 0")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora-dropout {dropout:g}: expected from 0, below 1")
    chosen = frozenset(TARGETS) if targets is None else parse_targets(targets)
    return LoraSettings(rank, alpha, chosen, dropout, seed, base, holds_fp8)
