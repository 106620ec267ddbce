"""Reinforcement learning as a ``Program``: Megatron's start, our loop.

Flags are expanded, checked and parsed as pretraining's are, and the model is built, loaded and
saved by Megatron's own functions; ``rl/loop.py`` takes the place of its training loop.
"""

from typing import TYPE_CHECKING, Any

from megatron_k2.rl.checks import check_rl
from megatron_k2.rl.flags import add_rl_arguments, expand
from megatron_k2.training.pretrain import Program

if TYPE_CHECKING:
    from megatron_k2.rl.assembly import MakeSide


def program(make_side: "MakeSide") -> Program:
    """Reinforcement learning with what ``make_side`` makes on rank 0."""
    return Program(
        "rl",
        expand,
        check_rl,
        lambda: (make_side, None),
        lambda _flags: [],
        arguments=add_rl_arguments,
        loop=_loop,
    )


def _loop(config: Any, providers: tuple[Any, None], hooks: Any) -> None:
    from megatron_k2.rl.assembly import learn

    learn(config, providers[0], hooks)
