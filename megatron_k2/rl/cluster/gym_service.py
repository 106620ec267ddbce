"""Environments and verifiers over HTTP: ``python -m megatron_k2.rl.cluster.gym_service ...``.

| verb | body | answer |
|---|---|---|
| ``POST /episodes/ID/reset`` | ``{"task": ...}`` | a step |
| ``POST /episodes/ID/step`` | ``{"ordinal": N, "action": message}``, N from 1 | a step |
| ``POST /episodes/ID/verify`` | ``{}`` | a verdict |
| ``POST /judge`` | ``{"task": ..., "answer": text}`` | a verdict |
| ``POST /close`` | ``{"ids": [...]}`` | how many there were |
| ``GET /health`` | | episodes, domains; without the token |

See ``gym_episodes.py`` for what ids and ordinals are for; ``--idle`` is when an episode is closed
for which nothing comes.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.gym.episode import Again
from megatron_k2.records.read import no_constant
from megatron_k2.rl.cluster import program
from megatron_k2.rl.cluster.gym_episodes import IDLE_SECONDS, Episodes, Refused
from megatron_k2.rl.cluster.rendezvous import Meeting, own_host
from megatron_k2.rl.cluster.serving import serving
from megatron_k2.rl.task_sets import open_domains, read_task_sets

KIND = "gym"
MOST_BYTES = 64 << 20
"""Of a body. Choice: a task with a repository in it, many times over."""
_SWEEP_SECONDS = 5.0


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
