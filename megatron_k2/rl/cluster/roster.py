"""Which engines there are, where and how: what supervisors publish, looked at once a second."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_k2.engine.protocol import NO_WEIGHTS, EngineError, Limits, PauseMode
from megatron_k2.engine.remote.endpoints import Endpoint
from megatron_k2.engine.remote.engine import RemoteEngine
from megatron_k2.errors import UserError
from megatron_k2.rl.cluster import probe
from megatron_k2.rl.cluster.engines import KIND, attempts_name
from megatron_k2.rl.cluster.rendezvous import Address, Meeting
from megatron_k2.rl.cluster.replica import Replica

_SLEEPERS = ("vllm",)
"""Back-ends with verbs to give their GPUs back."""


@dataclass(frozen=True)
class FleetPatience:
    """How long a fleet waits, in seconds. All are choices.

    Raises:
        UserError: a value that is not positive.
    """

    look: float = 1.0
    """Between two looks at an engine."""
    silent: float = 30.0
    """After which an engine's requests are asked of another."""
    away: float = 1800.0
    """For one engine at least that can be asked; a K2 replica takes minutes to start again."""
    again: float = 0.2
    """Before a request that failed is asked again."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"{name} {value!r}: expected more than 0")


class Roster:
    """See the module. Of one event loop.

    Args:
        meeting: of the job's start.
        num_replicas: of the run.
        limits: of every engine.
        patience: how often it looks, and who is silent.
    """

    def __init__(
        self, meeting: Meeting, num_replicas: int, limits: Limits, patience: FleetPatience
    ) -> None:
        self._meeting, self._limits, self._patience = meeting, limits, patience
        self._token = meeting.token()
        self._replicas: dict[int, Replica] = {}
        self._why = dict.fromkeys(range(num_replicas), "it has not published an address")
        """Of each: why there is no replica, or none any longer."""
        self._over: set[int] = set()
        """Those that were given up."""
        self.paused: str | None = None
        """The mode in which every engine is paused, those that come back too."""
        self._changed = asyncio.Event()
        self._session = probe.session()
        self._watchers = [asyncio.create_task(self._watch(i)) for i in range(num_replicas)]

    def __iter__(self) -> Iterator[Replica]:
        """Those that have published where they are, by index."""
        return iter([each for _, each in sorted(self._replicas.items())])

    def up(self) -> list[Replica]:
        """Those that answered when they were last looked at."""
        return [each for each in self if each.is_up]

    def is_current(self, replica: Replica) -> bool:
        """Whether it was not started again since."""
        return self._replicas.get(replica.address.index) is replica

    def told(self) -> str:
        """How each of them is, for a sentence."""
        return "; ".join(
            f"engine {i}: {why if i in self._over else self._replicas.get(i, why)}"
            for i, why in self._why.items()
        )

    def notify(self) -> None:
        """Wake those that wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, seconds: float) -> None:
        """Wait for a change, or so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    async def look(self) -> None:
        """Look at every engine now."""
        await asyncio.gather(*(self.look_at(index) for index in self._why))

    async def look_at(self, index: int) -> None:
        """Read where an engine is now, and ask how it is."""
        address = await asyncio.to_thread(self._read, index)
        found = self._replicas.get(index)
        if address is not None and (found is None or found.address != address):
            found = await self._replaced(index, address)
        if found is None:
            return
        before, silent = (found.seen, found.is_up), self._patience.silent
        seen = await probe.look(self._session, found.address.url, self._token, silent)
        if not self.is_current(found):
            return
        found.note(seen, silent)
        await self._keep_paused(found)
        if (found.seen, found.is_up) != before:  # thousands of requests may wait for it
            self.notify()

    def _read(self, index: int) -> Address | None:
        """On a thread: the disk may be slow."""
        if why := self._meeting.given_up(attempts_name(index)):
            self._why[index] = why
            self._over.add(index)
        try:
            return self._meeting.read(KIND, index)
        except UserError as problem:
            self._why[index] = str(problem)
            return None

    async def pause(self, mode: PauseMode) -> None:
        """Of all; those that come back later are paused then.

        Raises:
            UserError: there is no such mode.
        """
        if mode not in ("abort", "wait", "keep"):
            raise UserError(f"pause mode {mode!r}: abort, wait or keep")
        self.paused = mode
        up = self.up()
        for each in up:
            each.is_paused = True
        await self._everywhere(up, f"/pause?mode={mode}")

    async def resume(self) -> None:
        """Go on."""
        self.paused = None
        up = self.up()
        for each in up:
            each.is_paused = False
        await self._everywhere(up, "/resume")

    async def sleep(self) -> None:
        """Give the GPUs back: weights and caches are thrown away, so that a whole round is due.

        Engines without such a verb (``local``) are paused alone.

        Raises:
            EngineError: an engine that is up does not do it; its memory is not free then.
        """
        await self.pause("abort")
        for each in self:
            each.empty()
        sleepers = self._sleepers()
        # its own tag outlives the weights, and others go by it
        await self._everywhere(sleepers, "/update_weight_version", {"new_version": NO_WEIGHTS})
        await self._everywhere(sleepers, "/sleep?level=2")

    async def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Take the GPUs again: room for weights before they are sent, for caches after.

        Raises:
            EngineError: an engine that is up does not do it.
        """
        await self._everywhere(self._sleepers(), f"/wake_up?tags={tag}")

    def _sleepers(self) -> list[Replica]:
        return [each for each in self.up() if each.address.details.get("backend") in _SLEEPERS]

    async def _everywhere(self, targets: Iterable[Replica], path: str, body: Any = None) -> None:
        """A verb; one that does not answer any more is passed over."""

        async def one(each: Replica) -> None:
            try:
                await each.post(path, body)
            except EngineError:
                await self.look_at(each.address.index)
                if each.is_up and self.is_current(each):
                    raise

        await asyncio.gather(*(one(each) for each in targets))

    async def close(self) -> None:
        """Look no more; end all requests."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for each in self:
            await each.close()
        await self._session.close()

    async def _watch(self, index: int) -> None:
        while True:
            await self.look_at(index)
            await asyncio.sleep(self._patience.look)

    async def _replaced(self, index: int, address: Address) -> Replica:
        """An engine of a new attempt; the requests of the one before are given up."""
        before = self._replicas.get(index)
        found = self._replicas[index] = Replica(address, self._meeting.token_path, self._limits)
        if before is not None:
            await before.close()
        return found

    async def _keep_paused(self, found: Replica) -> None:
        if self.paused is not None and found.is_up and not found.is_paused:
            with contextlib.suppress(EngineError):
                await found.post(f"/pause?mode={self.paused}")
                found.is_paused = True


async def length_of(
    meeting: Meeting, index: int, vocab_size: int, end: float, tell: Callable[[str], None]
) -> int:
    """Tokens of prompt and answer that an engine holds, once it is up.

    Raises:
        UserError: it did not come up.
        EngineError: it does not say it.
    """

    def given_up() -> str:
        return meeting.given_up(attempts_name(index))

    while True:
        left = max(0.0, end - time.monotonic())
        address = await meeting.wait(KIND, index, left, tell=tell, given_up=given_up)
        endpoint = Endpoint(address.url, key_file=meeting.token_path)
        try:
            engine = await RemoteEngine.connect([endpoint], vocab_size=vocab_size)
        except EngineError:  # it has just gone again
            if time.monotonic() > end:
                raise
            await asyncio.sleep(1.0)
            continue
        await engine.close()
        return engine.limits.max_length
