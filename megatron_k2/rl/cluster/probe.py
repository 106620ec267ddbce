"""One look at an engine's server: does it answer, may it be asked, which weights does it hold."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_k2.errors import UserError

try:
    import aiohttp
except ImportError:  # the extra "remote"
    aiohttp = None  # type: ignore[assignment]


class Probe(NamedTuple):
    """What was seen."""

    is_alive: bool
    """It answered, whatever it said."""
    is_ready: bool
    """It says that it can be asked."""
    version: str | None
    """Of the weights that it says it holds whole; None: of none."""
    detail: str


def session(headers: Mapping[str, str] | None = None, *, keeps: bool = False) -> Any:
    """Connections of the running event loop, without a bound on their number; the caller closes it.

    Args:
        headers: of every request.
        keeps: whether one is used again.

    Raises:
        UserError: aiohttp is not installed.
    """
    if aiohttp is None:
        raise UserError("aiohttp is not installed; pip install 'megatron-k2[remote]'")
    connector = aiohttp.TCPConnector(limit=0, force_close=not keeps)
    return aiohttp.ClientSession(connector=connector, headers=headers)


async def look(client: Any, url: str, token: str, seconds: float) -> Probe:
    """Ask for health and, where that does not say them, for the weights' version.

    Args:
        client: of ``session``.
        url: of the server.
        token: its key.
        seconds: after which it is taken for silent.
    """
    timeout = aiohttp.ClientTimeout(total=seconds)
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with client.get(f"{url}/health", timeout=timeout) as answer:
            is_ready, said = answer.status == 200, _object(await answer.read())
        if not is_ready:
            return Probe(True, False, None, str(said.get("detail") or f"status {answer.status}"))
        if "weight_version" in said:  # ours
            return Probe(True, True, str(said["weight_version"]), "")
        async with client.get(f"{url}/weight_info", timeout=timeout, headers=headers) as answer:
            version = _object(await answer.read()).get("weight_version")
        return Probe(True, True, None if version is None else str(version), "")
    except TimeoutError:
        return Probe(False, False, None, f"{url} did not answer in {seconds:g} seconds")
    except (aiohttp.ClientError, OSError) as problem:
        return Probe(False, False, None, f"{url}: {type(problem).__name__}: {problem}"[:300])


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
