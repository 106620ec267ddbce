"""The HTTP face: routes, limits, keys, errors as sentences.

A body is read as bytes up to a bound before anything looks at it. Its work is a task of its own,
cancelled when the client goes away or the deadline passes; a cancelled answer ends in the engine.
Admin verbs exist only where they were asked for.
"""

import asyncio
import hmac
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.responses import StreamingResponse as Streaming
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel

from megatron_k2.engine.protocol import EngineError
from megatron_k2.engine.server import chat, completions, tokens
from megatron_k2.engine.server.bodies import (
    AbortBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
    read_body,
)
from megatron_k2.engine.server.page import PAGE
from megatron_k2.engine.server.service import BusyError, Service
from megatron_k2.errors import UserError

CLIENT_GONE = 499
"""nginx's; nobody reads it, the metrics count it."""


KEEP_ALIVE_SECONDS = 75
"""nginx's. uvicorn's 5 close connections that a waiting client is about to use again, which it sees
as a request lost."""


class Failure(Exception):  # noqa: N818  # not an error of the server: an answer
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def response(self) -> Response:
        """OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "code": self.status}
        return JSONResponse({"error": error}, self.status)


def failure_of(error: BaseException) -> Failure:
    """What a client is told of an error."""
    if isinstance(error, BaseExceptionGroup):
        return failure_of(error.exceptions[0])
    match error:
        case Failure():
            return error
        case UserError():
            return Failure(400, str(error))
        case BusyError():
            return Failure(429, str(error))
        case EngineError():
            return Failure(503, str(error))
        case TimeoutError():
            return Failure(504, "the deadline passed before the answer was whole")
    return Failure(500, f"{type(error).__name__} in the server; its log says where")


class Metrics:
    """Prometheus' numbers of one server."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        answered = "Requests answered, by route and status."
        self.requests = Counter(
            "k2_requests", answered, ["route", "status"], registry=self.registry
        )
        took = "Seconds from a body's arrival to its last byte."
        self.seconds = Histogram("k2_request_seconds", took, ["route"], registry=self.registry)
        running = Gauge("k2_running", "Sequences in slots.", registry=self.registry)
        running.set_function(lambda: service.engine.health().num_running)
        waiting = Gauge("k2_waiting", "Sequences that wait for a slot.", registry=self.registry)
        waiting.set_function(lambda: service.engine.health().num_waiting)


async def content_of(request: Request, most: int) -> bytes:
    """The body.

    Raises:
        Failure: it is longer than ``most`` bytes; no more than that is read.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise Failure(413, f"the body is longer than {most:,} bytes, the most that is read")
        parts.append(part)
    return b"".join(parts)


async def until_gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def attended[Result](
    work: Coroutine[Any, Any, Result], request: Request, seconds: float
) -> Result:
    """Work for as long as somebody waits for it.

    Raises:
        TimeoutError: the deadline passed.
        Failure: the client has gone.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(until_gone(request))
    try:
        async with asyncio.timeout(seconds):
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Failure(CLIENT_GONE, "the client has gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def events(
    answer: AsyncGenerator[Any, None], first: Any, seconds: float
) -> AsyncIterator[str]:
    """Server-sent events; an error on the way is the last of them."""
    try:
        async with asyncio.timeout(seconds), aclosing(answer):
            yield f"data: {json.dumps(first, ensure_ascii=False)}\n\n"
            async for piece in answer:
                yield f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
    except Exception as error:
        found = failure_of(error)
        told = {"error": {"message": str(found), "code": found.status}}
        yield f"data: {json.dumps(told)}\n\n"
    yield "data: [DONE]\n\n"


def listening(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app, host, port, log_level="warning", timeout_keep_alive=KEEP_ALIVE_SECONDS
    )


def make_app(service: Service, *, api_key: str | None = None, has_admin: bool = False) -> FastAPI:
    """The application.

    Args:
        service: what it serves.
        api_key: that a client must send as its bearer token, on all but health and metrics.
        has_admin: whether ``/pause``, ``/resume`` and the like exist.
    """
    app = FastAPI(title="megatron_k2", docs_url=None, redoc_url=None)
    metrics = Metrics(service)
    open_paths = {"/", "/health", "/metrics"}

    @app.middleware("http")
    async def guarded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        route = request.url.path if request.url.path in known else "other"
        with metrics.seconds.labels(route).time():
            if api_key is not None and request.url.path not in open_paths:
                sent = request.headers.get("authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(sent.encode(), api_key.encode()):
                    response = Failure(401, "the API key is missing or wrong").response()
                    metrics.requests.labels(route, 401).inc()
                    return response
            response = await call(request)
        metrics.requests.labels(route, response.status_code).inc()
        return response

    def post[Body: BaseModel](
        path: str, kind: type[Body], answer: Callable[[Body, Request], Awaitable[Any]]
    ) -> None:
        async def handler(request: Request) -> Response:
            try:
                content = await content_of(request, service.limits.body_bytes)
                found = await answer(read_body(kind, content), request)
            except (Exception, BaseExceptionGroup) as error:
                return failure_of(error).response()
            return found if isinstance(found, Response) else JSONResponse(found)

        schema = {"schema": kind.model_json_schema(ref_template="#/components/schemas/{model}")}
        body = {"required": True, "content": {"application/json": schema}}
        app.post(path, openapi_extra={"requestBody": body}, responses=_ERRORS)(handler)

    def served(module: Any) -> Callable[[Any, Request], Awaitable[Any]]:
        async def answer(body: Any, request: Request) -> Any:
            service.require_model(body.model)
            name = f"{'chatcmpl' if module is chat else 'cmpl'}-{uuid.uuid4().hex}"
            seconds = service.limits.seconds
            if not body.stream:
                return await attended(module.complete(service, body, name), request, seconds)
            pieces = module.stream(service, body, name)
            first = await attended(anext(pieces), request, seconds)
            return Streaming(events(pieces, first, seconds), media_type="text/event-stream")

        return answer

    async def generate(body: GenerateBody, request: Request) -> Any:
        name = body.request_id or f"gen-{uuid.uuid4().hex}"
        work = tokens.generate(service, body, name)
        return await attended(work, request, service.limits.seconds)

    async def tokenize(body: TokenizeBody, _request: Request) -> Any:
        return tokens.tokenize(service, body)

    async def detokenize(body: DetokenizeBody, _request: Request) -> Any:
        return tokens.detokenize(service, body)

    post("/v1/chat/completions", ChatBody, served(chat))
    post("/v1/completions", CompletionBody, served(completions))
    post("/inference/v1/generate", GenerateBody, generate)
    post("/tokenize", TokenizeBody, tokenize)
    post("/detokenize", DetokenizeBody, detokenize)
    if has_admin:
        _add_admin(app, service, post)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        length = service.engine.limits.max_length
        one = {"id": service.name, "object": "model", "owned_by": "megatron_k2"}
        return {"object": "list", "data": [one | {"max_model_len": length}]}

    @app.get("/health")
    async def health() -> Response:
        found = service.engine.health()
        return JSONResponse(found._asdict(), 200 if found.is_ready else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        return PlainTextResponse(generate_latest(metrics.registry).decode())

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    known = {getattr(route, "path", "") for route in app.routes}
    return app


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": said}
    for status, said in {
        400: "A field is wrong, or not computed here.",
        401: "No key.",
        413: "Too long.",
        429: "Too many requests.",
        503: "The engine is not ready.",
        504: "The deadline passed.",
    }.items()
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'"
}


def _add_admin(app: FastAPI, service: Service, post: Callable[..., None]) -> None:
    """Verbs for whoever trains, by vLLM's names."""

    async def pause(request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        try:
            await service.engine.pause(mode)  # type: ignore[arg-type]  # the engine refuses others
        except UserError as error:
            return failure_of(error).response()
        return JSONResponse({"status": "paused", "mode": mode})

    async def resume() -> Response:
        await service.engine.resume()
        return JSONResponse({"status": "resumed"})

    async def abort(body: AbortBody, _request: Request) -> Any:
        await service.engine.abort(body.request_ids)
        return {"status": "aborted"}

    app.post("/pause", responses=_ERRORS)(pause)
    app.post("/resume")(resume)
    app.get("/is_paused")(lambda: {"is_paused": service.engine.health().is_paused})
    app.get("/weight_info")(lambda: {"weight_version": service.engine.health().weight_version})
    post("/abort_requests", AbortBody, abort)
