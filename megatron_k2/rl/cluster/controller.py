"""``python -m megatron_k2.rl.cluster.controller --meet DIR <the trainer's flags>``: what samples.

One process beside rank 0 of the trainer. It owns the collector, the ledger and what is held out,
and asks the engines of the run, and the gym service where there is one. Rank 0 asks it
(``remote_side.py``), in small JSON and short answers:

    POST /collect {iteration, version}   {"state": ...}: "running", "update" (an engine is up and
                                         has no weights of that version: give it some, ask again),
                                         "done" with metrics and the place in the ledger, or
                                         "refused" and "failed" with a sentence
    POST /committed {iteration}          a checkpoint has trained on it
    POST /close                          the run ends: what was finished is in the ledger

Groups do not travel: "done" means that the ledger, on the disk that both see, has them.
"""

import asyncio
import hmac
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from megatron_k2.engine.protocol import EngineError
from megatron_k2.errors import UserError
from megatron_k2.rl.loop import Collected

ANSWER_SECONDS = 1.0
"""That a question waits for its answer. Choice: rank 0 hears of a lost engine so soon."""
MOST_FAILURES = 20
"""In a row, of engines at one iteration. Choice: each restart of all engines is one."""


class Samples(Protocol):
    """What the controller runs: ``rl/side.py``'s ``Sampling``."""

    async def collect(self, iteration: int, version: int) -> Collected:
        """Into the ledger."""
        ...

    async def committed(self, iteration: int) -> None:
        """A checkpoint has it."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


class Controller:
    """The verbs, without HTTP.

    Args:
        sampling: of the run.
        lacking: asked for a version: which engines are up and have not got it, in words; empty:
            none.
        tell: is called with a sentence of what happens.
    """

    def __init__(
        self,
        sampling: Samples,
        lacking: Callable[[str], Awaitable[str]],
        tell: Callable[[str], None],
    ) -> None:
        self._sampling, self._lacking, self._tell = sampling, lacking, tell
        self._asked = (-1, -1)
        self._task: asyncio.Task[Collected] | None = None
        self._num_failures = 0

    async def collect(self, iteration: int, version: int) -> dict[str, Any]:
        """See the module; the work goes on between two questions.

        Args:
            iteration: from 0.
            version: of the trainer's weights.
        """
        if (iteration, version) != self._asked:
            await self._leave()
            self._asked, self._num_failures = (iteration, version), 0
        if detail := await self._lacking(str(version)):
            return {"state": "update", "detail": detail}
        if self._task is None:
            self._task = asyncio.create_task(self._sampling.collect(iteration, version))
        done, _ = await asyncio.wait({self._task}, timeout=ANSWER_SECONDS)
        return self._outcome(self._task) if done else {"state": "running"}

    def _outcome(self, task: asyncio.Task[Collected]) -> dict[str, Any]:
        self._task = None
        error = task.exception()
        if error is None:
            found = task.result()
            return {"state": "done", "metrics": found.metrics, "position": found.position}
        if isinstance(error, UserError):
            return {"state": "refused", "detail": str(error)}
        self._num_failures += 1
        if isinstance(error, EngineError) and self._num_failures < MOST_FAILURES:
            self._tell(f"iteration {self._asked[0]}: {error}; it is gone on with")
            return {"state": "running"}
        return {"state": "failed", "detail": f"{type(error).__name__}: {error}"}

    async def _leave(self) -> None:
        """Stop what is sampled; what was finished is in the ledger."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def committed(self, iteration: int) -> dict[str, Any]:
        """See the module."""
        await self._sampling.committed(iteration)
        return {}

    async def close(self) -> None:
        """Admit nothing more and let go of the ledger."""
        await self._leave()
        await self._sampling.close()
