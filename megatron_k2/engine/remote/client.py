"""The project's one asynchronous HTTP client: JSON to OpenAI-compatible endpoints, until answered.

A request goes to one of several endpoints, is repeated elsewhere or later when the answer is an
error that may pass, cut or not JSON, and ends in exactly one answer or one exception. Keys come
from the environment or a file and stand in headers alone: neither errors nor logs hold them.
"""

import asyncio
import email.utils
import json
import logging
import os
import random
import time
from collections.abc import Sequence
from typing import Any, Self

from megatron_k2.engine.protocol import EngineError, UpdateCode, UpdateError
from megatron_k2.engine.remote.endpoints import Endpoint, Endpoints, Policy, State
from megatron_k2.errors import UserError

try:
    import aiohttp
except ImportError:  # the extra "remote"
    aiohttp = None  # type: ignore[assignment]

PASSING = frozenset({408, 429, 500, 502, 503, 504, 529})
"""Statuses that another attempt may not meet."""
_BUSY = frozenset({429, 503, 529})
_log = logging.getLogger(__name__)


class RefusedError(UserError):
    """The endpoint says that the request itself is wrong."""

    def __init__(self, said: str, status: int) -> None:
        super().__init__(said)
        self.status = status


class _AttemptError(Exception):
    """One attempt failed, in a way that may pass."""

    def __init__(
        self, why: str, *, retry_after: float | None = None, is_busy: bool = False
    ) -> None:
        super().__init__(why)
        self.retry_after, self.is_busy = retry_after, is_busy
        self.update_code: UpdateCode | None = None
        """Where the endpoint says how a round of weights ended."""


def retry_after_of(value: str | None, now: float) -> float | None:
    """Seconds that a ``Retry-After`` header asks for; ``None`` where it is absent or unreadable.

    Args:
        value: a number of seconds, or a date.
        now: seconds since 1970.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return seconds if 0 <= seconds < 86_400 else None


class Client:
    """Answers from several endpoints. Of one event loop; ``async with``, or ``close``.

    Args:
        endpoints: servers of the same model.
        policy: how long and how often is tried.
        seed: of what the waits are drawn from.

    Raises:
        UserError: aiohttp is not installed, a key's variable is not set, or an endpoint is wrong.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], policy: Policy | None = None, seed: int = 0
    ) -> None:
        if aiohttp is None:
            raise UserError("aiohttp is not installed; pip install 'megatron-k2[remote]'")
        self.policy = policy or Policy()
        self.endpoints = Endpoints(endpoints, self.policy)
        for state in self.endpoints.states:
            state.headers = _headers(state.endpoint)
        self._draws = random.Random(seed)
        self._slots = asyncio.Semaphore(self.policy.concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def post(self, path: str, body: Any, *, seconds: float | None = None) -> Any:
        """One answer.

        Args:
            path: of the route, from ``/``.
            body: JSON.
            seconds: in place of the policy's deadline.

        Raises:
            RefusedError: the endpoint refused the request itself; its own sentence.
            EngineError: no attempt was answered, or the deadline passed.
        """
        content = json.dumps(body).encode()
        deadline = self.policy.deadline_seconds if seconds is None else seconds
        last = "nothing was tried"
        state: State | None = None
        try:
            async with asyncio.timeout(deadline):
                for attempt in range(1, self.policy.attempts + 1):
                    async with self._slots:
                        state = await self._awake(state)
                        try:
                            return await self._attempt(state, path, content)
                        except _AttemptError as error:
                            last = f"{state.endpoint.base}{path}: {error}"
                            wait = self.policy.wait(attempt, error.retry_after, self._draws)
                            _log.debug("attempt %d of %s; next in %.2f s", attempt, last, wait)
                    if attempt < self.policy.attempts:
                        await asyncio.sleep(wait)
        except TimeoutError:
            raise EngineError(f"no answer in {deadline:g} s; at last {last}") from None
        raise EngineError(f"no answer in {self.policy.attempts} attempts; at last {last}")

    async def _awake(self, tried: State | None) -> State:
        """The endpoint to ask, once it does not rest."""
        while True:
            now = time.monotonic()
            state = self.endpoints.choose(now, tried)
            if state.rests_until <= now:
                return state
            await asyncio.sleep(state.rests_until - now)

    async def _attempt(self, state: State, path: str, content: bytes) -> Any:
        state.num_running += 1
        try:
            found = await self._answer(state, "POST", path, content)
        except _AttemptError as error:
            now = time.monotonic()
            self.endpoints.failed(state, str(error), now, is_busy=error.is_busy)
            raise
        finally:
            state.num_running -= 1
        self.endpoints.succeeded(state)
        return found

    async def once(self, state: State, method: str, path: str, body: Any = None) -> Any:
        """One attempt at one endpoint, for verbs that must not go to another.

        Raises:
            UserError: the endpoint refused the request itself.
            UpdateError: it says how a round of weights ended.
            EngineError: anything else.
        """
        content = b"" if body is None else json.dumps(body).encode()
        try:
            return await self._answer(state, method, path, content)
        except _AttemptError as error:
            said = f"{state.endpoint.base}{path}: {error}"
            if error.update_code is not None:
                raise UpdateError(error.update_code, said) from None
            raise EngineError(said) from None

    async def _answer(self, state: State, method: str, path: str, content: bytes) -> Any:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self.policy.attempt_seconds, sock_connect=20)
            connector = aiohttp.TCPConnector(limit=0)  # ``_slots`` is the bound
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        url = state.endpoint.base + path
        try:
            async with self._session.request(
                method, url, data=content, headers=state.headers, allow_redirects=False
            ) as response:
                return _checked(
                    response.status, response.headers.get("Retry-After"), await response.read(), url
                )
        except TimeoutError:
            raise _AttemptError(f"no answer in {self.policy.attempt_seconds:g} s") from None
        except aiohttp.ClientError as error:
            raise _AttemptError(f"{type(error).__name__}: {str(error)[:200]}") from None


def _headers(endpoint: Endpoint) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if (key := _key(endpoint)) is not None:
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _key(endpoint: Endpoint) -> str | None:
    if endpoint.key_env is not None:
        if not (key := os.environ.get(endpoint.key_env, "")):
            raise UserError(f"key_env {endpoint.key_env} of {endpoint.base}: not set")
        return key
    if endpoint.key_file is None:
        return None
    try:
        return endpoint.key_file.read_text().strip()
    except OSError as problem:
        raise UserError(
            f"key_file {endpoint.key_file} of {endpoint.base}: {problem.strerror}"
        ) from None


def _checked(status: int, retry_after: str | None, content: bytes, url: str) -> Any:
    """What an answer says.

    Raises:
        _AttemptError: nothing that is whole.
        RefusedError: that the request is wrong.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        if status == 200:
            raise _AttemptError("an answer that is no JSON, or was cut") from None
        value = None
    if status == 200:
        return value
    said = f"status {status}: {_sentence(value, content)}"
    if status in PASSING:
        asked = retry_after_of(retry_after, time.time())
        failed = _AttemptError(said, retry_after=asked, is_busy=status in _BUSY)
        code = _field(value, "update_code")
        if code in list(UpdateCode):
            failed.update_code = UpdateCode(code)
        raise failed
    raise RefusedError(f"{url}: {said}", status)


def _sentence(value: Any, content: bytes) -> str:
    """The message of an error, wherever it stands."""
    message = _field(value, "message") or _field(value, "error") or _field(value, "detail")
    return str(message or content[:200].decode(errors="replace"))[:500]


def _field(value: Any, name: str) -> Any:
    """Of an error's object, or of what it stands in."""
    for place in (value.get("error"), value) if isinstance(value, dict) else ():
        if isinstance(place, dict) and name in place:
            return place[name]
    return None
