"""Domains whose environments and verifiers are in a service elsewhere (``gym_service.py``).

Where the service of an episode has gone, the episode is gone with it: it fails with the reason, and
whoever plays it may begin another one, at whichever service is up by then.
"""

import time
import uuid
import weakref
from collections.abc import Sequence
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.episode import Again
from megatron_k2.gym.protocol import Domain, Environment, Step, Task, Verdict, unknown
from megatron_k2.records.messages import Message
from megatron_k2.rl.cluster.gym_client import GoneError, GymClient, ServiceError
from megatron_k2.rl.cluster.gym_wire import step_from, verdict_from
from megatron_k2.rl.cluster.rendezvous import Address


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
        end = time.monotonic() + self._client.patience.away
        while True:
            self._address = address = await self._client.choose()
            self._name, self._ordinal = uuid.uuid4().hex, 0
            self._client.opened(address)
            self._end = weakref.finalize(self, self._client.dropped, address, self._name)
            self._end.atexit = False
            try:
                return step_from(await self._post("reset", {"task": task.as_json()}))
            except GoneError:
                self._drop()
                if time.monotonic() > end:
                    raise

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
