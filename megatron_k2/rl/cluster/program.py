"""What the programs of a cluster share: they end by SIGTERM, and refuse with a sentence."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from megatron_k2.errors import UserError


def run(program: str, work: Coroutine[Any, Any, None]) -> int:
    """Run until it returns, or until SIGTERM or SIGINT cancels it.

    Args:
        program: its name, in front of a sentence.
        work: everything it does; what it has to put in order it does when it is cancelled.

    Returns:
        The exit code: 0, also where it was told to end; 2 for what is refused.
    """
    try:
        asyncio.run(_ended_by_signals(work))
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


async def _ended_by_signals(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    told: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        if not told:  # a second one does not cut the first one's work short
            told.append(number)
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    try:
        await task
    except asyncio.CancelledError:
        if not told:
            raise
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A sentence for a person where there is one, else the first error."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        refused = found.subgroup(UserError)
        found = (refused or found).exceptions[0]
    return found
