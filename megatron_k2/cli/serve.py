"""``megatron-k2 serve``: an OpenAI-compatible server over the embedded engine."""

import argparse
import functools
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron_k2.data.tokenizer import Tokenizer
    from megatron_k2.engine.protocol import Engine
    from megatron_k2.engine.server.service import ServerLimits
    from megatron_k2.engine.transfer.bucket_files import BucketFolder

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-k2 serve", description=__doc__.partition(": ")[2]
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="Hugging Face directory, or a run")
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: read DIR's "
        "config.json alone; 503 until new weights have come whole (--weights-dir)",
    )
    add("--tokenizer", type=Path, metavar="PATH", help="default: DIR's, or what the run was fed")
    add("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    add("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    add("--name", help="of the model (default: the directory's)")
    add("--num-slots", type=int, default=16, help="sequences at once (default: %(default)s)")
    add("--max-length", type=int, help="tokens of each (default: the model's, at most 4096)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--device", default="cpu", help="cpu or cuda")
    add("--processes", type=int, default=1, help="on a CPU, one a core (default: %(default)s)")
    add("--batch-invariant", action="store_true", help="same bits whatever else is served; slower")
    add("--memory-gb", type=float, help="most that weights and slots may take")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the key")
    add("--admin", action="store_true", help="also /pause, /resume, /abort_requests, new weights")
    add("--weights-dir", type=Path, metavar="DIR", help="that new weights may come from (--admin)")
    add("--max-requests", type=int, default=2048, help="in flight (default: %(default)s)")
    add("--max-body-mb", type=float, default=8, help="(default: %(default)s)")
    add("--deadline", type=float, default=600, help="seconds of a request (default: %(default)s)")
    return parser


def _require_packages() -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} is not installed; pip install 'megatron-k2[serve]'")


def _api_key(arguments: argparse.Namespace) -> str | None:
    if arguments.api_key_env is None:
        if arguments.host not in _LOOPBACK:
            raise UserError(
                f"--host {arguments.host} can be reached from other machines: give --api-key-env, "
                "or leave --host out"
            )
        return None
    key = os.environ.get(arguments.api_key_env, "")
    if not key:
        raise UserError(f"--api-key-env {arguments.api_key_env}: this variable is not set")
    return key


def _limits(arguments: argparse.Namespace) -> "ServerLimits":
    from megatron_k2.engine.server.service import ServerLimits

    if arguments.max_requests < 1 or arguments.max_body_mb <= 0 or arguments.deadline <= 0:
        raise UserError("--max-requests, --max-body-mb and --deadline: expected more than 0")
    body_bytes = int(arguments.max_body_mb * (1 << 20))
    return ServerLimits(body_bytes, arguments.max_requests, arguments.deadline)


def _tokenizer_of(load: Path, given: Path | None) -> Path:
    """Where the tokenizer lies: as given, in a Hugging Face directory, or where a run had it.

    Raises:
        UserError: nothing is there, or a run does not say.
    """
    from megatron_k2.checkpoint.hf.reader import is_hf_directory
    from megatron_k2.engine.mcore.saved_args import plain_saved_args, tokenizer_path

    if not load.is_dir():
        raise UserError(f"--load {load}: no such directory; expected a Hugging Face one, or a run")
    if is_hf_directory(load):
        return given or load
    return tokenizer_path(plain_saved_args(load, None)[1], given)


def _weights_folder(arguments: argparse.Namespace) -> "BucketFolder | None":
    from megatron_k2.engine.transfer.bucket_files import BucketFolder

    if arguments.weights_dir is None:
        if arguments.load_format == "dummy":
            raise UserError("--load-format dummy: weights then have to come; give --weights-dir")
        return None
    if not arguments.admin:
        raise UserError("--weights-dir is of use with --admin alone; give both, or neither")
    return BucketFolder(arguments.weights_dir)


def _engine(arguments: argparse.Namespace, load: "Callable[[], Tokenizer]") -> "Engine":
    import torch

    from megatron_k2.checkpoint.stored_model import described_model, open_model
    from megatron_k2.engine.local.engine import LocalEngine
    from megatron_k2.engine.local.opened import core_of
    from megatron_k2.engine.local.pool import PoolEngine
    from megatron_k2.engine.protocol import NO_WEIGHTS

    folder, memory = arguments.load, arguments.memory_gb
    is_empty = arguments.load_format == "dummy"
    longest = (described_model if is_empty else open_model)(folder).preset.max_position_embeddings
    options: dict[str, Any] = {
        "num_slots": arguments.num_slots,
        "max_length": arguments.max_length or min(longest, 4096),
        "dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype],
        "version": NO_WEIGHTS if is_empty else "0",
        "memory_bytes": None if memory is None else int(memory * 2**30),
        "is_batch_invariant": arguments.batch_invariant,
        "tokenizer": load,
    }
    if arguments.processes == 1:
        return LocalEngine(core_of(folder, device=arguments.device, **options))
    if arguments.device != "cpu":
        raise UserError(f"--processes {arguments.processes}: on a CPU alone; leave it or --device")
    return PoolEngine.from_directory(folder, num_processes=arguments.processes, **options)


def _run(arguments: argparse.Namespace, api_key: str | None, weights: "BucketFolder | None") -> int:
    import asyncio

    from megatron_k2.data.tokenizer import load_tokenizer
    from megatron_k2.engine.server.app import make_app
    from megatron_k2.engine.server.listening import listening
    from megatron_k2.engine.server.service import Service

    limits = _limits(arguments)
    tokenizer_of = functools.partial(
        load_tokenizer, _tokenizer_of(arguments.load, arguments.tokenizer)
    )
    tokenizer = tokenizer_of()
    engine = _engine(arguments, tokenizer_of)
    name = arguments.name or arguments.load.resolve().name
    service = Service(engine, tokenizer, name, limits)
    app = make_app(service, api_key=api_key, has_admin=arguments.admin, weights=weights)
    config = listening(app, arguments.host, arguments.port)
    asyncio.run(_serve(config, name))
    return 0


async def _serve(config: Any, name: str) -> None:
    """Run uvicorn, and say where it listens once it does."""
    import asyncio

    import uvicorn

    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started and not task.done():
        await asyncio.sleep(0.02)
    if server.started:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        print(f"serving '{name}' at http://{host}:{port}", flush=True)
    await task


def main(argv: list[str]) -> int:
    """Check, load, serve until interrupted."""
    arguments = _parser().parse_args(argv)
    _require_packages()
    api_key = _api_key(arguments)
    return _run(arguments, api_key, _weights_folder(arguments))
