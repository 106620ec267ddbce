"""Environments and verifiers over HTTP: ``python -m megatron_k2.rl.cluster.gym_service ...``.

| verb | body | answer |
|---|---|---|
| ``POST /episodes/ID/reset`` | ``{"task": ...}`` | a step |
| ``POST /episodes/ID/step`` | ``{"ordinal": N, "action": message}``, N from 1 | a step |
| ``POST /episodes/ID/verify`` | ``{}`` | a verdict |
| ``POST /judge`` | ``{"task": ..., "answer": text}`` | a verdict |
| ``POST /close`` | ``{"ids": [...]}`` | how many there were |
| ``GET /health`` | | episodes, domains; without the token |

An episode's id is its caller's. A step whose ordinal has come before is answered with what it gave
then, so that a request whose answer was lost may be sent again; what an environment was told once
is not told twice. Episodes are closed by name, or once nothing has come for ``--idle`` seconds.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.gym.episode import Again
from megatron_k2.gym.protocol import Domain, Environment, Step, task_from
from megatron_k2.records.read import message_from, no_constant
from megatron_k2.rl.cluster import program
from megatron_k2.rl.cluster.gym_wire import step_object, verdict_object
from megatron_k2.rl.cluster.rendezvous import Meeting, own_host
from megatron_k2.rl.cluster.serving import serving
from megatron_k2.rl.task_sets import open_domains, read_task_sets

KIND = "gym"
IDLE_SECONDS = 7200.0
"""Choice: longer than a turn takes to be drawn, weights that are sent meanwhile included."""
MOST_BYTES = 64 << 20
"""Of a body. Choice: a task with a repository in it, many times over."""
_SWEEP_SECONDS = 5.0


class Refused(Exception):  # noqa: N818  # an answer
    """A request that cannot be answered as it stands."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Episode:
    """One environment, its last call, and what that gave.

    Args:
        environment: of this episode alone.
        called: seconds of the clock, when something came last.
    """

    def __init__(self, environment: Environment, called: float) -> None:
        self.environment, self.called = environment, called
        self._ordinal = -1
        self._last: asyncio.Task[Step] | None = None

    async def step(self, ordinal: int, call: Callable[[], Awaitable[Step]]) -> Step:
        """The answer to a call, made once however often it is asked for.

        Args:
            ordinal: 0 for ``reset``.
            call: of the environment.

        Raises:
            Refused: it is neither the last one again nor the next, or that is still under way.
        """
        is_under_way = self._last is not None and not self._last.done()
        if ordinal == self._ordinal + 1 and not is_under_way:
            self._ordinal, self._last = ordinal, asyncio.ensure_future(_task(call))
        elif ordinal != self._ordinal:
            state = "is under way" if is_under_way else "was the last"
            raise Refused(409, f"step {ordinal}, and {self._ordinal} {state}")
        last = self._last
        assert last is not None
        try:
            return await asyncio.shield(last)  # whoever asked may go; it is told again
        except Again:
            if self._last is last:  # nothing has happened
                self._ordinal, self._last = ordinal - 1, None
            raise

    async def close(self) -> None:
        """End what it does, and what it has where it says how."""
        if self._last is not None:
            self._last.cancel()
            await asyncio.gather(self._last, return_exceptions=True)
        for name in ("close", "end"):  # no part of the protocol; those of ``gym/adapters`` do
            if callable(end := getattr(self.environment, name, None)):
                with contextlib.suppress(Exception):
                    await end()
                return


async def _task(call: Callable[[], Awaitable[Step]]) -> Step:
    return await call()


class Episodes:
    """All that are open.

    Args:
        domains: by name, open.
        idle_seconds: after which one is closed.
        clock: seconds.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._domains, self._idle, self._clock = domains, idle_seconds, clock
        self._open: dict[str, Episode] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def reset(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Begin an episode, or say again how it began."""
        task = _read(task_from, body, "task")
        if name not in self._open:
            environment = self._domain(task.domain).environment()
            self._open[name] = Episode(environment, self._clock())
        episode = self._of(name)
        return step_object(await episode.step(0, lambda: episode.environment.reset(task)))

    async def step(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One action."""
        episode, action = self._of(name), _read(message_from, body, "action")
        ordinal = body.get("ordinal")
        if not isinstance(ordinal, int) or ordinal < 1:
            raise Refused(400, f"ordinal {ordinal!r}: expected a number from 1")
        return step_object(await episode.step(ordinal, lambda: episode.environment.step(action)))

    async def verify(self, name: str, _body: Mapping[str, Any]) -> dict[str, Any]:
        """Judge an episode as it stands."""
        return verdict_object(await self._of(name).environment.verify())

    async def judge(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Verify a single answer."""
        task = _read(task_from, body, "task")
        if not isinstance(answer := body.get("answer"), str):
            raise Refused(400, "answer: expected text")
        return verdict_object(await self._domain(task.domain).judge(task, answer))

    async def close(self, names: Sequence[str]) -> int:
        """End these; how many of them there were."""
        found = [each for name in names if (each := self._open.pop(name, None)) is not None]
        await asyncio.gather(*(each.close() for each in found))
        return len(found)

    async def sweep(self) -> int:
        """End those for which nothing has come for long; how many there were."""
        now = self._clock()
        idle = [name for name, each in self._open.items() if now - each.called > self._idle]
        return await self.close(idle)

    async def close_all(self) -> None:
        """End everything, the domains too."""
        await self.close(list(self._open))
        for domain in self._domains.values():
            await domain.close()

    def _of(self, name: str) -> Episode:
        if (found := self._open.get(name)) is None:
            raise Refused(
                404,
                f"no episode {name[:80]!r}: it was closed, had been idle for {self._idle:g} "
                "seconds, or the service was started again",
            )
        found.called = self._clock()
        return found

    def _domain(self, name: str) -> Domain:
        if (found := self._domains.get(name)) is None:
            known = ", ".join(sorted(self._domains))
            raise Refused(400, f"domain {name[:80]!r} is not open here; {known} are")
        return found


def _read(read: Callable[[dict[str, Any]], Any], body: Mapping[str, Any], name: str) -> Any:
    try:
        return read(body[name])
    except (KeyError, ValueError, TypeError, AttributeError) as problem:
        raise Refused(400, f"{name}: {problem}"[:500]) from None


def make_app(episodes: Episodes, token: str, domains: Sequence[str]) -> Any:
    """The application.

    Args:
        episodes: that it opens and plays.
        token: that every request but ``/health`` must carry.
        domains: their names, for ``/health``.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    from megatron_k2.engine.server.attending import Failure, content_of, has_key

    @contextlib.asynccontextmanager
    async def living(_app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(episodes))
        yield
        sweeping.cancel()
        await episodes.close_all()

    app = FastAPI(title="megatron_k2 gym", docs_url=None, redoc_url=None, lifespan=living)

    def post(path: str, answer: Callable[..., Awaitable[Any]]) -> None:
        async def handler(request: Request) -> JSONResponse:
            if not has_key(request, token):
                return _error(JSONResponse, 401, "the token is missing or wrong")
            try:
                body = _object(await content_of(request, MOST_BYTES))
                return JSONResponse(await answer(*request.path_params.values(), body))
            except (Refused, Failure) as problem:
                return _error(JSONResponse, problem.status, str(problem))
            except Again as problem:
                return _error(JSONResponse, 503, f"Again: {problem}", again=True)
            except Exception as problem:  # whatever an environment raises is its failure
                return _error(JSONResponse, 500, f"{type(problem).__name__}: {problem}"[:500])

        app.post(path)(handler)

    post("/episodes/{name}/reset", episodes.reset)
    post("/episodes/{name}/step", episodes.step)
    post("/episodes/{name}/verify", episodes.verify)
    post("/judge", episodes.judge)

    async def close(body: Mapping[str, Any]) -> dict[str, int]:
        return {"closed": await episodes.close([str(each) for each in body.get("ids", [])])}

    post("/close", close)
    app.get("/health")(lambda: {"episodes": len(episodes), "domains": sorted(domains)})
    return app


def _error(response: Any, status: int, message: str, **more: Any) -> Any:
    return response({"error": {"message": message, "code": status} | more}, status)


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content, parse_constant=no_constant)
    except (ValueError, RecursionError) as problem:
        raise Refused(400, f"the body is no JSON: {problem}") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body is {type(found).__name__}; expected an object")
    return found


async def _sweep(episodes: Episodes) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        await episodes.sweep()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gym_service", description=__doc__.partition(":")[0])
    add = parser.add_argument
    add("--meet", type=Path, required=True, metavar="DIR", help="meeting folder of this start")
    add("--tasks", type=Path, required=True, metavar="FILE", help="task sets, as the trainer's")
    add("--sandbox", metavar="NAME", help="back-end for domains that run programs")
    index = int(os.environ.get("SLURM_PROCID", 0))
    add("--index", type=int, default=index, help="among the services (default: SLURM_PROCID)")
    add("--host", help="address to listen on (default: that of this node's name)")
    add("--idle", type=float, default=IDLE_SECONDS, help="seconds (default: %(default)s)")
    return parser


async def _serve(arguments: argparse.Namespace) -> None:
    def tell(text: str) -> None:
        print(f"gym {arguments.index}: {text}", flush=True)

    host, meeting = own_host(arguments.host), Meeting(arguments.meet)
    sets = read_task_sets(arguments.tasks)
    domains = await open_domains(sets, sandbox=arguments.sandbox, tell=tell)
    names = sorted(domains)
    episodes, token = Episodes(domains, arguments.idle), meeting.token()
    async with serving(lambda: make_app(episodes, token, names), host) as port:
        meeting.publish(KIND, arguments.index, host, port, details={"domains": names})
        tell(f"{', '.join(names)} at {host}:{port}")
        await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; the exit code."""
    return program.run("gym_service", _serve(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
