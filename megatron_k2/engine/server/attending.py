"""One body's way: read up to a bound, worked on while somebody waits, refused by a sentence."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from megatron_k2.engine.protocol import EngineError, UpdateError
from megatron_k2.engine.server.service import BusyError
from megatron_k2.errors import UserError

CLIENT_GONE = 499
"""nginx's; nobody reads it, the metrics count it."""


class Failure(Exception):  # noqa: N818  # not an error of the server: an answer
    """An answer that is an error."""

    def __init__(self, status: int, message: str, **more: str) -> None:
        super().__init__(message)
        self.status, self.more = status, more

    def response(self) -> Response:
        """OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error: dict[str, Any] = {"message": str(self), "type": kind, "code": self.status}
        error |= self.more
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
        case UpdateError():
            return Failure(503, str(error), update_code=error.code)
        case EngineError():
            return Failure(503, str(error))
        case TimeoutError():
            return Failure(504, "the deadline passed before the answer was whole")
    logging.getLogger(__name__).error("an answer failed", exc_info=error)
    return Failure(500, f"{type(error).__name__} in the server; its log says where")


def has_key(request: Request, key: str) -> bool:
    """Whether the bearer token is this one, compared in constant time."""
    sent = request.headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(sent.encode(), key.encode())


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
