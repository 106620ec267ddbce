"""A real uvicorn on a port of the system, in a thread; an embedded engine with random weights."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import torch
import uvicorn

from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.engine.constrained import Grammars
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.listening import listening
from megatron_k2.engine.server.service import Service
from tests.engine.local.models import TINY


def tokenizer_in(directory):
    """A small one with K2's control tokens."""
    train_byte_bpe(["The sum of 1 and 2 is 3. get_weather {city: Paris}\n"] * 50, 400, directory)
    return load_tokenizer(directory)


def random_engine(tokenizer):
    """Weights small enough that every token has its chance."""
    preset = replace(TINY, vocab_size=tokenizer.vocab_size + 5, max_position_embeddings=4096)
    weights = Weights(preset, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    places = weights._places.items()
    weights.load([(n, 0.05 * torch.randn(p.shape, generator=generator)) for n, p in places])
    grammars = Grammars(lambda: tokenizer, preset.vocab_size)
    return LocalEngine(Core(weights, num_slots=6, max_length=2048, grammars=grammars))


@contextlib.contextmanager
def served(make_engine, tokenizer, limits=None, **options):
    """Yields (base URL, service); ``make_engine`` is called on the server's event loop."""
    found, is_up = {}, threading.Event()

    async def run():
        service = Service(make_engine(), tokenizer, "tiny", limits)
        config = listening(make_app(service, **options), "127.0.0.1", 0)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        found.update(server=server, url=f"http://127.0.0.1:{port}", service=service)
        is_up.set()
        await task
        await service.engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert is_up.wait(30)
    try:
        yield found["url"], found["service"]
    finally:
        found["server"].should_exit = True
        thread.join(30)


def settled(service, seconds=5.0):
    """Whether nothing is in flight any longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not service.num_running and not service.engine.health().num_running:
            return True
        time.sleep(0.01)
    return False
