"""``torchrun -m megatron_k2.rl.train <flags>``: reinforcement learning; Megatron's start, our loop.

Flags are expanded, checked and parsed as pretraining's are, and the model is built, loaded and
saved by Megatron's own functions; ``rl/loop.py`` takes the place of its training loop.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_k2.flags.words import last_value
from megatron_k2.rl.checks import check_embedded, check_rl
from megatron_k2.rl.flags import add_rl_arguments, expand
from megatron_k2.rl.synthetic import write_letter_tasks, write_tokenizer
from megatron_k2.run.flags import RunFlags
from megatron_k2.training.pretrain import Program, main

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_k2.presets import ModelPreset
    from megatron_k2.rl.assembly import MakeSide
    from megatron_k2.rl.loop import Side


def program(make_side: "MakeSide", check: Callable[[RunFlags, int], None] = check_rl) -> Program:
    """Reinforcement learning with what ``make_side`` makes on rank 0."""
    return Program(
        "rl",
        expand,
        check,
        lambda: (make_side, None),
        _prepare,
        arguments=add_rl_arguments,
        loop=_loop,
    )


def _prepare(flags: RunFlags) -> list[str]:
    tasks, tokenizer = (last_value(flags.words, name) for name in ("--tasks", "--chat-tokenizer"))
    if "--synthetic-data" in flags and tasks and tokenizer and flags.vocab_size is not None:
        write_letter_tasks(Path(tasks))
        write_tokenizer(Path(tokenizer), flags.vocab_size)
    return []


def _loop(config: Any, providers: tuple[Any, None], hooks: Any) -> None:
    from megatron_k2.rl.assembly import learn

    learn(config, providers[0], hooks)


async def _embedded(args: "Namespace", preset: "ModelPreset", iteration: int) -> "Side":
    from megatron_k2.rl.side import make_side

    return await make_side(args, preset, iteration)


RL = program(_embedded, check_embedded)

if __name__ == "__main__":
    main(RL)
