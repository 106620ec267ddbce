"""How an application of HTTP is served; nothing of an engine, nor torch."""

import uvicorn
from fastapi import FastAPI

KEEP_ALIVE_SECONDS = 75
"""nginx's. uvicorn's 5 close connections that a waiting client is about to use again, which it sees
as a request lost."""


def listening(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app, host, port, log_level="warning", timeout_keep_alive=KEEP_ALIVE_SECONDS
    )
