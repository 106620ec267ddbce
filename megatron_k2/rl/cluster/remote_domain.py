"""Domains whose environments and verifiers are in a service elsewhere (``gym_service.py``).

A request whose answer is lost is sent again with the same ordinal, and an environment is told
nothing twice. Where the service itself has gone, its episodes are gone with it: the episode fails
with the reason, and whoever plays it may begin another one, at whichever service is up by then.
Episodes that their caller has dropped are closed, also those that no verdict was asked of.
"""

import asyncio
import contextlib
import json
import random
import time
import uuid
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.episode import Again
from megatron_k2.gym.protocol import Domain, Environment, Step, Task, Verdict, unknown
from megatron_k2.records.messages import Message
from megatron_k2.rl.cluster import probe
from megatron_k2.rl.cluster.gym_service import KIND
from megatron_k2.rl.cluster.gym_wire import step_from, verdict_from
from megatron_k2.rl.cluster.rendezvous import Address, Meeting

CLOSE_SECONDS = 2.0
"""Between two looks for episodes that were dropped."""


class ServiceError(Exception):
    """An environment's service failed, or its environment did; the message says which."""


@dataclass(frozen=True)
class GymPatience:
    """How long a client waits, in seconds. All are choices.

    Raises:
        UserError: a value that is not positive.
    """

    call: float = 3600.0
    """For one answer. Whoever plays an episode has a deadline of its own, and a shorter one."""
    away: float = 100.0
    """For a service to come (back): less than ``Bounds.call_seconds`` of an episode."""
    again: float = 0.3
    """Between two attempts at a request whose answer was lost."""
    tries: int = 3
    """Of a request, at a service that is still there."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"{name} {value!r}: expected more than 0")


class GymClient:
    """The services of a run. Of one event loop; close it.

    Args:
        meeting: of the job's start.
        num_services: of the run.
        patience: how long is waited.
    """

    def __init__(
        self, meeting: Meeting, num_services: int = 1, patience: GymPatience | None = None
    ) -> None:
        self._meeting, self._indices = meeting, range(num_services)
        self.patience = patience or GymPatience()
        self._headers = {"Authorization": f"Bearer {meeting.token()}"}
        self._session = probe.session()
        self._num_open = dict.fromkeys(self._indices, 0)
        self._dropped: deque[tuple[Address, str]] = deque()
        self._closing = asyncio.create_task(self._close_dropped())

    async def post(self, address: Address, path: str, body: Any) -> Any:
        """One answer of one service, asked for again where it was lost.

        Raises:
            Again: the environment says that nothing has happened.
            ServiceError: the service has gone, or refuses; or its environment failed.
        """
        content, why = json.dumps(body).encode(), ""
        for number in range(1, self.patience.tries + 1):
            try:
                return await self._once(address, path, content)
            except _LostError as lost:
                why = f"gym {address.index} at {address.url}: {lost}"
                if number == self.patience.tries or self._has_moved(address):
                    break
                await asyncio.sleep(self.patience.again * number)
        raise ServiceError(why)

    async def choose(self) -> Address:
        """The service with fewest open episodes; where none is up, the next that is.

        Raises:
            ServiceError: none came up.
        """
        end = time.monotonic() + self.patience.away
        while True:
            for index in sorted(self._indices, key=lambda i: (self._num_open[i], random.random())):
                with contextlib.suppress(UserError):
                    address = self._meeting.read(KIND, index)
                    if address is not None and await self._is_up(address):
                        return address
            if time.monotonic() > end:
                raise ServiceError(
                    f"no gym service was up for {self.patience.away:g} seconds, of "
                    f"{len(self._indices)}; their own outputs say why"
                )
            await asyncio.sleep(self.patience.again)

    def opened(self, address: Address) -> None:
        """An episode was begun there."""
        self._num_open[address.index] += 1

    def dropped(self, address: Address, name: str) -> None:
        """An episode has no caller any longer; it is closed by and by."""
        self._num_open[address.index] -= 1
        self._dropped.append((address, name))

    async def close(self) -> None:
        """Close what is left, and the connections."""
        self._closing.cancel()
        await asyncio.gather(self._closing, return_exceptions=True)
        await self._close_all()
        await self._session.close()

    def _has_moved(self, address: Address) -> bool:
        """Whether another process has taken its place."""
        with contextlib.suppress(UserError):
            return self._meeting.read(KIND, address.index) != address
        return True

    async def _is_up(self, address: Address) -> bool:
        timeout = probe.aiohttp.ClientTimeout(total=5)
        try:
            async with self._session.get(f"{address.url}/health", timeout=timeout) as answer:
                return bool(answer.status == 200)
        except (TimeoutError, OSError, probe.aiohttp.ClientError):
            return False

    async def _once(self, address: Address, path: str, content: bytes) -> Any:
        url, timeout = address.url + path, probe.aiohttp.ClientTimeout(total=self.patience.call)
        try:
            async with self._session.post(
                url, data=content, headers=self._headers, timeout=timeout
            ) as answer:
                found = json.loads(await answer.read())
                status = answer.status
        except TimeoutError:
            raise _LostError(f"no answer in {self.patience.call:g} seconds") from None
        except (OSError, probe.aiohttp.ClientError) as problem:
            raise _LostError(f"{type(problem).__name__}: {problem}"[:300]) from None
        except ValueError:
            raise _LostError("an answer that is no JSON, or was cut") from None
        if status == 200:
            return found
        error = found.get("error", {}) if isinstance(found, dict) else {}
        said = str(error.get("message") or f"status {status}")
        if error.get("again"):
            raise Again(said)
        raise ServiceError(said)

    async def _close_dropped(self) -> None:
        while True:
            await asyncio.sleep(CLOSE_SECONDS)
            await self._close_all()

    async def _close_all(self) -> None:
        names: dict[str, tuple[Address, list[str]]] = {}
        while self._dropped:
            address, name = self._dropped.popleft()
            names.setdefault(address.url, (address, []))[1].append(name)
        for address, ids in names.values():
            with contextlib.suppress(_LostError, ServiceError, Again):  # gone: they are, too
                await self._once(address, "/close", json.dumps({"ids": ids}).encode())


class _LostError(Exception):
    """No answer came."""


class RemoteDomain:
    """A domain of a service; see ``gym/protocol.py``.

    Args:
        name: of the registry.
        client: the caller's, who closes it.
    """

    def __init__(self, name: str, client: GymClient) -> None:
        self.name, self._client = name, client

    async def judge(self, task: Task, answer: str) -> Verdict:
        """Verify a single answer; *unknown* where no service does."""
        body = {"task": task.as_json(), "answer": answer}
        try:
            address = await self._client.choose()
            return verdict_from(await self._client.post(address, "/judge", body))
        except (ServiceError, Again, ValueError) as problem:
            return unknown(str(problem))

    def environment(self) -> Environment:
        """For one episode."""
        return RemoteEnvironment(self._client)

    async def close(self) -> None:
        """Nothing of its own: the client is shared."""


class RemoteEnvironment:
    """One episode at one service.

    Args:
        client: of the services.
    """

    def __init__(self, client: GymClient) -> None:
        self._client = client
        self._address: Address | None = None
        self._name, self._ordinal = "", 0
        self._end: weakref.finalize[Any, Any] | None = None

    async def reset(self, task: Task) -> Step:
        """Begin, at whichever service is up; a second time begins another episode.

        Raises:
            ServiceError: none is up, or the environment failed.
        """
        self._drop()
        self._address = address = await self._client.choose()
        self._name, self._ordinal = uuid.uuid4().hex, 0
        self._client.opened(address)
        self._end = weakref.finalize(self, self._client.dropped, address, self._name)
        self._end.atexit = False
        return step_from(await self._post("reset", {"task": task.as_json()}))

    async def step(self, action: Message) -> Step:
        """One action, that the environment is told once.

        Raises:
            Again: nothing has happened.
            ServiceError: the service has gone, and its episodes, or the environment failed.
        """
        body = {"ordinal": self._ordinal + 1, "action": action.to_object()}
        found = step_from(await self._post("step", body))
        self._ordinal += 1
        return found

    async def verify(self) -> Verdict:
        """The verdict; the episode is closed after it.

        Raises:
            ServiceError: as of ``step``.
        """
        found = verdict_from(await self._post("verify", {}))
        self._drop()
        return found

    async def _post(self, verb: str, body: Any) -> Any:
        if self._address is None:
            raise UserError(f"{verb} before reset: the environment has no task")
        return await self._client.post(self._address, f"/episodes/{self._name}/{verb}", body)

    def _drop(self) -> None:
        if self._end is not None:
            self._end()


async def remote_domains(names: Sequence[str], client: GymClient) -> dict[str, Domain]:
    """Domains by name, at the services.

    Args:
        names: of the run's tasks.
        client: of the services.

    Raises:
        UserError: the services do not have one of them.
        ServiceError: none is up.
    """
    there = (await client.choose()).details.get("domains", [])
    if missing := sorted(set(names) - set(there)):
        raise UserError(
            f"the gym services have no {', '.join(missing)}; give them the same --tasks as the run"
        )
    return {name: RemoteDomain(name, client) for name in names}
