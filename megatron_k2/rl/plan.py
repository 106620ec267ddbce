"""How much an iteration samples, and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.episode import Bounds
from megatron_k2.rl.cut import Cut
from megatron_k2.rl.record import Group


@dataclass(frozen=True)
class Plan:
    """How much is sampled, and when an iteration is over.

    Raises:
        UserError: a number below 1, or fewer groups in play than end an iteration.
    """

    group_size: int
    """K."""
    cut: Cut
    groups_in_play: int
    """Prompts at once, those that go on included; more than ``cut.num_groups`` make long answers
    be resumed in a later iteration instead of being waited for."""
    concurrency: int = 256
    """Answers that are played at once; changes nothing but speed."""
    bounds: Bounds = field(default_factory=Bounds)

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.concurrency < 1:
            raise UserError(
                f"groups of {self.group_size}, {self.concurrency} at once: expected 1 or more"
            )
        if self.groups_in_play < self.cut.num_groups:
            raise UserError(
                f"groups_in_play={self.groups_in_play} is less than the {self.cut.num_groups} "
                "groups that end an iteration; it would never end"
            )


@dataclass(frozen=True)
class Iteration:
    """What an iteration trains on."""

    number: int
    version: int
    """Of the weights that sampled it, apart from what it resumed."""
    groups: tuple[Group, ...]
    """In the order of their ordinals; may be none where ``num_steps`` ended it."""
    facts: Mapping[str, Any]
    """Of the cut: ``num_steps``, at which it was; ``num_cut_off``, answers that go on after it;
    ``num_tokens``, drawn and kept; ``num_dropped_tokens``; ``num_format_errors``, turns of the
    groups; and by task set ``temperatures`` and ``num_left_out``, tasks out of the curriculum."""
    is_replayed: bool
    """Whether it was handed out before this process began."""
