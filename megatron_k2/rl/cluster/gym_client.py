"""The services of a run's environments, as who plays episodes sees them: which is up, one answer.

A request whose answer is lost is sent again, to the same service alone: its ordinal says which it
is. Episodes that their caller has dropped are closed, also those that no verdict was asked of.
"""

import asyncio
import contextlib
import json
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.episode import Again
from megatron_k2.rl.cluster import probe
from megatron_k2.rl.cluster.gym_service import KIND
from megatron_k2.rl.cluster.rendezvous import Address, Meeting

TEND_SECONDS = 2.0
"""Between two looks for episodes that were dropped, and for services that have come back."""
_LOOK_SECONDS = 5.0
"""After which a service is not asked for new episodes. Choice: its loop is busy for less."""


class ServiceError(Exception):
    """An environment's service failed, or its environment did; the message says which."""


class GoneError(ServiceError):
    """A service gives no answer any more."""


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
        self._meeting = meeting
        self.patience = patience or GymPatience()
        headers = {"Authorization": f"Bearer {meeting.token()}"}
        self._session = probe.session(headers, keeps=True)
        self._num_open = dict.fromkeys(range(num_services), 0)
        self._up: dict[int, Address] = {}
        self._dropped: deque[tuple[Address, str]] = deque()
        self._tending = asyncio.create_task(self._tend())

    async def post(self, address: Address, path: str, body: Any) -> Any:
        """One answer of one service, asked for again where it was lost.

        Raises:
            Again: the environment says that nothing has happened.
            GoneError: the service has gone.
            ServiceError: the service refuses, or its environment failed.
        """
        content, why = json.dumps(body).encode(), ""
        for number in range(1, self.patience.tries + 1):
            try:
                return await self._once(address, path, content)
            except _LostError as lost:
                why = f"gym {address.index} at {address.url}: {lost}"
                if number == self.patience.tries or await self._has_moved(address):
                    break
                await asyncio.sleep(self.patience.again * number)
        if self._up.get(address.index) == address:
            del self._up[address.index]
        raise GoneError(why)

    async def choose(self) -> Address:
        """The service with fewest open episodes; where none is up, the next that is.

        Raises:
            GoneError: none came up.
        """
        end = time.monotonic() + self.patience.away
        while not self._up:
            await self._look()
            if not self._up:
                if time.monotonic() > end:
                    raise GoneError(
                        f"no gym service was up for {self.patience.away:g} seconds, of "
                        f"{len(self._num_open)}; their own outputs say why"
                    )
                await asyncio.sleep(self.patience.again)
        return self._up[min(self._up, key=self._num_open.__getitem__)]

    def opened(self, address: Address) -> None:
        """An episode was begun there."""
        self._num_open[address.index] += 1

    def dropped(self, address: Address, name: str) -> None:
        """An episode has no caller any longer; it is closed by and by."""
        self._num_open[address.index] -= 1
        self._dropped.append((address, name))

    async def close(self) -> None:
        """Close what is left, and the connections."""
        self._tending.cancel()
        await asyncio.gather(self._tending, return_exceptions=True)
        await self._close_dropped()
        await self._session.close()

    async def _look(self) -> None:
        """Find the services that are up."""
        found = await asyncio.gather(*map(self._found, self._num_open))
        self._up = {address.index: address for address in found if address is not None}

    async def _found(self, index: int) -> Address | None:
        address = await asyncio.to_thread(self._read, index)
        if address is None:
            return None
        timeout = probe.aiohttp.ClientTimeout(total=_LOOK_SECONDS)
        try:
            async with self._session.get(f"{address.url}/health", timeout=timeout) as answer:
                return address if answer.status == 200 else None
        except (TimeoutError, OSError, probe.aiohttp.ClientError):
            return None

    def _read(self, index: int) -> Address | None:
        with contextlib.suppress(UserError):
            return self._meeting.read(KIND, index)
        return None

    async def _has_moved(self, address: Address) -> bool:
        """Whether another process has taken its place."""
        return await asyncio.to_thread(self._read, address.index) != address

    async def _once(
        self, address: Address, path: str, content: bytes, seconds: float | None = None
    ) -> Any:
        seconds = seconds or self.patience.call
        timeout = probe.aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.post(
                address.url + path, data=content, timeout=timeout
            ) as answer:
                found = json.loads(await answer.read())
                status = answer.status
        except TimeoutError:
            raise _LostError(f"no answer in {seconds:g} seconds") from None
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

    async def _tend(self) -> None:
        """Close what was dropped; notice services that have gone, or come back."""
        while True:
            await asyncio.sleep(TEND_SECONDS)
            await self._look()
            await self._close_dropped()

    async def _close_dropped(self) -> None:
        names: dict[Address, list[str]] = {}
        while self._dropped:
            address, name = self._dropped.popleft()
            names.setdefault(address, []).append(name)
        for address, ids in names.items():
            with contextlib.suppress(_LostError, ServiceError, Again):  # gone: they are, too
                content = json.dumps({"ids": ids}).encode()
                await self._once(address, "/close", content, _LOOK_SECONDS)


class _LostError(Exception):
    """No answer came."""
