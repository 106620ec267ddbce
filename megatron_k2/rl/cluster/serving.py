"""An HTTP application of one of the cluster's programs, on a port of the system's choice."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from megatron_k2.errors import UserError

LAST_SECONDS = 1
"""For answers under way when a program is told to end."""


@contextlib.asynccontextmanager
async def serving(make_app: Callable[[], Any], host: str) -> AsyncIterator[int]:
    """Serve for as long as the block lasts; gives the port.

    Args:
        make_app: FastAPI's; called here, where packages that are missing are told.
        host: address to listen on.

    Raises:
        UserError: a package is not installed, or the address is not this machine's.
    """
    try:
        import uvicorn

        from megatron_k2.engine.server.listening import listening

        app = make_app()
    except ImportError as missing:
        raise UserError(
            f"{missing.name} is not installed; pip install 'megatron-k2[serve]'"
        ) from None

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # ``program.run`` has them

    with _bound(host) as bound:
        config = listening(app, host, bound.getsockname()[1])
        config.timeout_graceful_shutdown = LAST_SECONDS
        server = Server(config)
        task = asyncio.create_task(server.serve([bound]))
        try:
            while not server.started and not task.done():
                await asyncio.sleep(0.02)
            yield config.port
        finally:
            server.should_exit = True
            await task


def _bound(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.bind((host, 0))
    except OSError as problem:
        found.close()
        raise UserError(f"--host {host}: {problem.strerror}") from None
    return found
