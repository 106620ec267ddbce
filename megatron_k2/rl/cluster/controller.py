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
import gc
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Protocol

from megatron_k2.engine.protocol import EngineError
from megatron_k2.errors import UserError
from megatron_k2.gym.protocol import Domain
from megatron_k2.rl.cluster import program
from megatron_k2.rl.cluster.given import Given, given
from megatron_k2.rl.cluster.gym_client import GymClient
from megatron_k2.rl.cluster.gym_service import KIND as GYM
from megatron_k2.rl.cluster.remote_domain import remote_domains
from megatron_k2.rl.cluster.rendezvous import own_host
from megatron_k2.rl.cluster.serving import serving
from megatron_k2.rl.loop import Collected
from megatron_k2.rl.side import open_sampling
from megatron_k2.rl.task_sets import domain_names, open_domains

KIND = "controller"
"""What it publishes itself as."""
COME_SECONDS = 3600.0
"""For whoever else is of this start to come up. Choice: K2's engines take many minutes."""
ANSWER_SECONDS = 1.0
"""That a question waits for its answer. Choice: rank 0 hears of a lost engine so soon."""
MOST_TRIES = 20
"""In a row: rollouts of an iteration that failed with the engines, or rounds of weights that left
one without. Choice: a restart of all engines is one."""


_MOST_BYTES = 1 << 16
_GC_THRESHOLDS = (50_000, 20, 50)
"""Objects, and collections of the younger generation, before each. Choice."""


class Samples(Protocol):
    """What the controller runs: ``rl/side.py``'s ``Sampling``."""

    async def collect(self, iteration: int, version: int) -> Collected | None:
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
        self._task: asyncio.Task[Collected | None] | None = None
        self._num_failures = self._num_updates = 0
        self.is_closed = asyncio.Event()

    async def collect(self, iteration: int, version: int) -> dict[str, Any]:
        """See the module; the work goes on between two questions.

        Args:
            iteration: from 0.
            version: of the trainer's weights.
        """
        if (iteration, version) != self._asked:
            await self._leave()
            self._asked, self._num_failures, self._num_updates = (iteration, version), 0, 0
        detail = await self._lacking(str(version))
        if detail and self._num_updates < MOST_TRIES:
            self._num_updates += 1
            self._tell(f"iteration {iteration}: weights of version {version} are due: {detail}")
            return {"state": "update", "detail": detail}
        if self._task is None:
            self._task = asyncio.create_task(self._sampling.collect(iteration, version))
        done, _ = await asyncio.wait({self._task}, timeout=ANSWER_SECONDS)
        return self._outcome(self._task) if done else {"state": "running"}

    def _outcome(self, task: "asyncio.Task[Collected | None]") -> dict[str, Any]:
        self._task = None
        error = task.exception()
        if error is None:
            found = task.result()
            assert found is not None  # ``Sampling`` loses no weights
            return {"state": "done", "metrics": found.metrics, "position": found.position}
        if isinstance(error, UserError):
            return {"state": "refused", "detail": str(error)}
        self._num_failures += 1
        if isinstance(error, EngineError) and self._num_failures < MOST_TRIES:
            self._tell(f"iteration {self._asked[0]}: {error}; it is begun again where it was")
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

    async def close(self) -> dict[str, Any]:
        """Admit nothing more and let go of the ledger."""
        if not self.is_closed.is_set():
            await self._leave()
            await self._sampling.close()
            self.is_closed.set()
        return {}


def make_app(controller: Controller, token: str) -> Any:
    """The verbs over HTTP.

    Args:
        controller: of the run.
        token: that every request carries.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    from megatron_k2.engine.server.attending import content_of, has_key

    app = FastAPI(title="megatron_k2 controller", docs_url=None, redoc_url=None)

    def post(path: str, verb: Callable[..., Awaitable[Any]], *names: str) -> None:
        async def answer(request: Request) -> JSONResponse:
            if not has_key(request, token):
                return JSONResponse({"error": "the token is missing or wrong"}, 401)
            try:
                body = json.loads(await content_of(request, _MOST_BYTES) or b"{}")
                values = [int(body[name]) for name in names]
            except (ValueError, KeyError, TypeError) as problem:
                said = f"expected {', '.join(names)}, whole numbers: {problem!r}"
                return JSONResponse({"error": said}, 400)
            return JSONResponse(await verb(*values))

        app.post(path)(answer)

    post("/collect", controller.collect, "iteration", "version")
    post("/committed", controller.committed, "iteration")
    post("/close", controller.close)
    return app


async def _control(options: Given) -> None:
    """Until rank 0 closes it, or SIGTERM ends it."""

    def tell(text: str) -> None:
        print(f"controller: {text}", flush=True)

    args, meeting = options.args, options.meeting
    async with AsyncExitStack() as stack:
        fleet = await options.open_fleet(tell)
        stack.push_async_callback(fleet.close)
        domains = await _domains(options, stack, tell)
        sampling = open_sampling(args, options.basis, fleet, domains)

        async def lacking(version: str) -> str:
            if fleet.health().weight_version != version:
                fleet.expect(version)
            if fleet.needs_weights():  # as of a second ago: rank 0 may have given them since
                look = asyncio.create_task(fleet.look())  # a wedged engine is not waited for
                await asyncio.wait({look}, timeout=ANSWER_SECONDS)
            return ", ".join(f"engine {index}" for index in fleet.needs_weights())

        controller = Controller(sampling, lacking, tell)
        stack.push_async_callback(controller.close)
        host, token = own_host(args.host), meeting.token()
        port = await stack.enter_async_context(serving(lambda: make_app(controller, token), host))
        meeting.publish(KIND, 0, host, port)
        tell(f"at {host}:{port}")
        await controller.is_closed.wait()


async def _domains(
    options: Given, stack: AsyncExitStack, tell: Callable[[str], None]
) -> dict[str, Domain]:
    """In this process, or at the gym services; ``Sampling`` closes them."""
    args, sets = options.args, options.basis.sets
    if not args.gym:
        return await open_domains(sets, sandbox=args.sandbox, tell=tell)
    for index in range(args.gym):
        await options.meeting.wait(GYM, index, COME_SECONDS, tell=tell)
    client = GymClient(options.meeting, args.gym)
    stack.push_async_callback(client.close)
    return await remote_domains(domain_names(sets), client)


def collect_seldom() -> None:
    """Look for cycles of garbage less often, and not among what a program has at its start.

    Thousands of answers under way are millions of objects that live, and Python's default walks
    them again and again: a third of the CPU that 8,000 answers took (benchmarks/rl_controller.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def main(argv: list[str] | None = None) -> int:
    """Sample for one start of a run; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        options = given(words)
    except UserError as error:
        print(f"controller: {error}", file=sys.stderr)
        return 2
    collect_seldom()
    return program.run("controller", _control(options))


if __name__ == "__main__":
    sys.exit(main())
