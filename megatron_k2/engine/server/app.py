"""The HTTP face: routes, limits, keys, errors as sentences.

A body is read as bytes up to a bound before anything looks at it. Its work is a task of its own,
cancelled when the client goes away or the deadline passes; a cancelled answer ends in the engine.
Admin verbs exist only where they were asked for.
"""

import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_k2.engine.server import chat, completions, tokens
from megatron_k2.engine.server.attending import (
    Failure,
    attended,
    content_of,
    events,
    failure_of,
    has_key,
)
from megatron_k2.engine.server.bodies import (
    AbortBody,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    FinishUpdateBody,
    GenerateBody,
    InitTransferBody,
    StartUpdateBody,
    TokenizeBody,
    UpdateBody,
    read_body,
)
from megatron_k2.engine.server.page import PAGE
from megatron_k2.engine.server.service import Service
from megatron_k2.engine.server.updates import WeightUpdates
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.errors import UserError

type Answer = Callable[[Any, Request], Awaitable[Any]]
type Post = Callable[[str, type[Body], Answer], None]


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


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    has_admin: bool = False,
    weights: BucketFolder | None = None,
) -> FastAPI:
    """The application.

    Args:
        service: what it serves.
        api_key: that a client must send as its bearer token, on all but health and metrics.
        has_admin: whether ``/pause``, ``/resume``, new weights and the like exist.
        weights: the directory that new weights may come from; ``None``: they may not.
    """
    updates = WeightUpdates(service.engine, weights, service.limits.seconds)

    @contextlib.asynccontextmanager
    async def living(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await updates.abandon("the server is shutting down")

    app = FastAPI(title="megatron_k2", docs_url=None, redoc_url=None, lifespan=living)
    metrics = Metrics(service)
    post = _poster(app, service)
    post("/v1/chat/completions", ChatBody, _served(service, chat, "chatcmpl"))
    post("/v1/completions", CompletionBody, _served(service, completions, "cmpl"))
    _add_token_routes(service, post)
    _add_looks(app, service, metrics)
    if has_admin:
        _add_admin(app, service, updates, post)
        _add_updates(app, service, updates, post)
    _guard(app, metrics, api_key)
    return app


def _guard(app: FastAPI, metrics: Metrics, api_key: str | None) -> None:
    """Before every route: the key; around it: the metrics."""
    known = {getattr(route, "path", "") for route in app.routes}

    @app.middleware("http")
    async def guarded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        path = request.url.path
        route = path if path in known else "other"
        with metrics.seconds.labels(route).time():
            if api_key is None or path in _OPEN_PATHS or has_key(request, api_key):
                response = await call(request)
            else:
                response = Failure(401, "the API key is missing or wrong").response()
        metrics.requests.labels(route, response.status_code).inc()
        return response


def _poster(app: FastAPI, service: Service) -> Post:
    """Adds a route that reads a body, and describes it."""

    def post(path: str, kind: type[Body], answer: Answer) -> None:
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

    return post


def _served(service: Service, module: Any, prefix: str) -> Answer:
    """``complete`` or ``stream`` of a module, as the body says."""

    async def answer(body: Any, request: Request) -> Any:
        service.require_model(body.model)
        name, seconds = f"{prefix}-{uuid.uuid4().hex}", service.limits.seconds
        if not body.stream:
            return await attended(module.complete(service, body, name), request, seconds)
        pieces = module.stream(service, body, name)
        first = await attended(anext(pieces), request, seconds)
        return StreamingResponse(events(pieces, first, seconds), media_type="text/event-stream")

    return answer


def _add_token_routes(service: Service, post: Post) -> None:
    async def generate(body: GenerateBody, request: Request) -> Any:
        name = body.request_id or f"gen-{uuid.uuid4().hex}"
        work = tokens.generate(service, body, name)
        return await attended(work, request, service.limits.seconds)

    async def tokenize(body: TokenizeBody, _request: Request) -> Any:
        return tokens.tokenize(service, body)

    async def detokenize(body: DetokenizeBody, _request: Request) -> Any:
        return tokens.detokenize(service, body)

    post("/inference/v1/generate", GenerateBody, generate)
    post("/tokenize", TokenizeBody, tokenize)
    post("/detokenize", DetokenizeBody, detokenize)


def _add_looks(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """What changes nothing: model, health, metrics, the page."""

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
_OPEN_PATHS = {"/", "/health", "/metrics"}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'"
}


def _add_admin(app: FastAPI, service: Service, updates: WeightUpdates, post: Post) -> None:
    """Verbs for whoever trains, by vLLM's names."""

    async def pause(request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        try:
            updates.require_closed()
            await service.engine.pause(mode)  # type: ignore[arg-type]  # the engine refuses others
        except (UserError, Failure) as error:
            return failure_of(error).response()
        return JSONResponse({"status": "paused", "mode": mode})

    async def resume() -> Response:
        try:
            updates.require_closed()
        except Failure as error:
            return error.response()
        await service.engine.resume()
        return JSONResponse({"status": "resumed"})

    async def abort(body: AbortBody, _request: Request) -> Any:
        updates.require_closed()
        await service.engine.abort(body.request_ids)
        return {"status": "aborted"}

    app.post("/pause", responses=_ERRORS)(pause)
    app.post("/resume")(resume)
    app.get("/is_paused")(lambda: {"is_paused": service.engine.health().is_paused})
    post("/abort_requests", AbortBody, abort)


def _add_updates(app: FastAPI, service: Service, updates: WeightUpdates, post: Post) -> None:
    """New weights, by vLLM's names."""

    async def init(body: InitTransferBody, _request: Request) -> Any:
        return updates.describe(body.init_info.backend)

    async def start(body: StartUpdateBody, _request: Request) -> Any:
        await updates.start(body.weight_version)
        return {"status": "started"}

    async def take(body: UpdateBody, _request: Request) -> Any:
        await updates.take(body.update_info.file)
        return {"status": "taken"}

    async def finish(body: FinishUpdateBody, _request: Request) -> Any:
        await updates.finish(body.weight_version, body.manifest)
        return {"status": "finished", "weight_version": body.weight_version}

    app.get("/weight_info")(lambda: {"weight_version": service.engine.health().weight_version})
    post("/init_weight_transfer_engine", InitTransferBody, init)
    post("/start_weight_update", StartUpdateBody, start)
    post("/update_weights", UpdateBody, take)
    post("/finish_weight_update", FinishUpdateBody, finish)
