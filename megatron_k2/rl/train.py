"""``torchrun -m megatron_k2.rl.train <flags>``: reinforcement learning; Megatron's start, our loop.

Flags are expanded, checked and parsed as pretraining's are, and the model is built, loaded and
saved by Megatron's own functions; ``rl/loop.py`` takes the place of its training loop.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value
from megatron_k2.rl.checks import check_rl, check_whole
from megatron_k2.rl.cluster.engines import read_engines
from megatron_k2.rl.flags import add_rl_arguments, expand
from megatron_k2.rl.synthetic import prepare
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
    prepare(flags)
    return []


def _loop(config: Any, providers: tuple[Any, None], hooks: Any) -> None:
    from megatron_k2.rl.assembly import learn

    learn(config, providers[0], hooks)


def _check(flags: RunFlags, world_size: int) -> None:
    check_whole(flags, world_size)
    meet, engines = (last_value(flags.words, name) for name in ("--meet", "--engines"))
    if (meet is None) != (engines is None):
        there, missing = ("--engines", "--meet") if meet is None else ("--meet", "--engines")
        raise UserError(f"{there} without {missing}: engines elsewhere meet there; give both")
    is_shared = engines is not None and read_engines(Path(engines)).colocated
    if is_shared and "--offload-in-rollout" not in flags:
        raise UserError(
            f"--engines {engines} says colocated: engines take the trainer's memory in a rollout; "
            "give --offload-in-rollout too"
        )


async def _side(args: "Namespace", preset: "ModelPreset", iteration: int) -> "Side":
    """The embedded engine in this process or, with ``--meet``, whoever is met there."""
    if args.meet is not None:
        from megatron_k2.rl.cluster.remote_side import make_side
    else:
        from megatron_k2.rl.side import make_side
    return await make_side(args, preset, iteration)


RL = program(_side, _check)

if __name__ == "__main__":
    main(RL)
