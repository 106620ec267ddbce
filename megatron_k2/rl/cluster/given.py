"""What the controller reads of the trainer's flags, without Megatron.

It is started with the same words as the trainer: what they say of sampling is one thing. Flags of
layouts, optimizer and model are passed over here.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.rl.checks import check_sampling
from megatron_k2.rl.cluster.engines import read_engines
from megatron_k2.rl.cluster.fleet import Fleet
from megatron_k2.rl.cluster.rendezvous import Meeting
from megatron_k2.rl.flags import add_rl_arguments, expand
from megatron_k2.rl.side import Basis, read_basis
from megatron_k2.rl.synthetic import prepare
from megatron_k2.run.flags import read_flags


@dataclass(frozen=True)
class Given:
    """Of one start of a run."""

    args: argparse.Namespace
    """What ``rl/side.py`` reads."""
    meeting: Meeting
    basis: Basis
    vocab_size: int

    async def open_fleet(self, tell: Callable[[str], None]) -> Fleet:
        """The engines, once all of them have come up; without weights as yet.

        Raises:
            UserError: one did not.
        """
        engines = read_engines(Path(self.args.engines))
        return await Fleet.open(
            self.meeting, engines.replicas, vocab_size=self.vocab_size, tell=tell
        )


def given(words: list[str]) -> Given:
    """Of what was typed.

    Args:
        words: the trainer's.

    Raises:
        UserError: what ``rl/checks.py`` refuses of sampling, or a size that no flag says.
    """
    flags = read_flags(expand(words, cuda=False))
    check_sampling(flags)
    prepare(flags)
    parser = argparse.ArgumentParser(prog="controller", allow_abbrev=False)
    parser.add_argument("--save")
    parser.add_argument("--seed", type=int, default=1234)  # Megatron's
    args = add_rl_arguments(parser).parse_known_args(flags.words)[0]
    if args.meet is None:
        raise UserError("missing --meet DIR: where the processes of this start meet")
    if flags.vocab_size is None:
        raise UserError("missing --vocab-size, or --preset: ids of the model")
    return Given(
        args, Meeting(Path(args.meet)), read_basis(args, flags.vocab_size), flags.vocab_size
    )
