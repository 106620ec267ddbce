"""Flags of a command that asks a model behind an OpenAI-compatible server, and its client."""

import argparse
from typing import TYPE_CHECKING

from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from megatron_k2.engine.remote.client import Client


def add_model(command: argparse.ArgumentParser) -> None:
    """``--model`` and ``--api-key-env``, beside an ``--endpoint`` of the command's own."""
    command.add_argument("--model", help="of the endpoint (default: its first)")
    command.add_argument("--api-key-env", metavar="NAME", help="environment variable of the key")


async def connected(arguments: argparse.Namespace, concurrency: int) -> "tuple[Client, str]":
    """A client of ``--endpoint``, and the model's name there.

    Raises:
        UserError: the endpoint does not say its models, and none was named.
    """
    from megatron_k2.engine.protocol import EngineError
    from megatron_k2.engine.remote.client import Client
    from megatron_k2.engine.remote.endpoints import Endpoint, Policy

    endpoint = Endpoint(arguments.endpoint, key_env=arguments.api_key_env)
    client = Client([endpoint], Policy(concurrency=concurrency))
    try:
        if arguments.model is not None:
            return client, arguments.model
        listed = await client.once(client.endpoints.states[0], "GET", "/v1/models")
        return client, str(listed["data"][0]["id"])
    except (EngineError, KeyError, IndexError, TypeError) as error:
        await client.close()
        raise UserError(f"--endpoint {arguments.endpoint}: {error}; give --model") from None
