"""Pipes of other processes, read and written without holding the event loop."""

import asyncio
import os

CHUNK_BYTES = 1 << 16


async def read_some(pipe: int) -> bytes:
    """What is there, once something is; nothing at the end."""
    os.set_blocking(pipe, False)
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    while True:
        try:
            return os.read(pipe, CHUNK_BYTES)
        except BlockingIOError:
            ready.clear()
        loop.add_reader(pipe, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(pipe)


async def write_all(pipe: int, content: bytes) -> None:
    """All of ``content``, as fast as it is read.

    Raises:
        BrokenPipeError: nobody reads any more.
    """
    os.set_blocking(pipe, False)
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    rest = memoryview(content)
    while rest:
        try:
            rest = rest[os.write(pipe, rest[:CHUNK_BYTES]) :]
            continue
        except BlockingIOError:
            ready.clear()
        loop.add_writer(pipe, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(pipe)
