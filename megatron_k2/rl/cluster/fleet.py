"""``Fleet``: the engines of a run behind the engine's protocol, some of which die.

A request goes to the least busy one that holds the version that is asked for, whole. Where that one
dies, hangs or is given new weights, the request is asked again of another: a draw hangs on the seed
and the token's place, so that the answer is the same. Where none is left, requests wait for one to
come back, up to a bound.

A round of weights goes to every engine that is up; one that fails in it is left out, and lacks
them. ``needs_weights`` says which are up without: another round *of the same version* goes to those
alone. Several fleets may look at the same engines, one that asks and one that sends weights: what
an engine holds is what its server says. ``expect`` tells one what another has sent.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Literal, Self

from torch import Tensor

from megatron_k2.engine.protocol import (
    NO_WEIGHTS,
    EngineError,
    Health,
    Limits,
    Output,
    PauseMode,
    Request,
    UpdateCode,
    UpdateError,
    check_request,
)
from megatron_k2.engine.remote.answers import tagged
from megatron_k2.engine.transfer.buckets import BUCKET_BYTES
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError
from megatron_k2.rl.cluster.rendezvous import Meeting
from megatron_k2.rl.cluster.replica import Replica
from megatron_k2.rl.cluster.roster import FleetPatience, Roster, length_of
from megatron_k2.rl.cluster.sending import Sending

NUM_TRIES = 100
"""Of one request, at engines that say they can be asked. Choice: twenty seconds' worth of errors
at once is no crash of an engine, which takes longer to come back and counts one."""


class Fleet:
    """See the module. Made by ``open``, on the event loop that it is used on.

    Args:
        roster: of the engines; the fleet's from here on.
        limits: of the smallest engine.
        patience: how long is waited.
        bucket_bytes: of new weights, sent at once.
    """

    def __init__(
        self,
        roster: Roster,
        limits: Limits,
        patience: FleetPatience,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.limits: Limits = limits
        self._roster, self._patience, self._bucket_bytes = roster, patience, bucket_bytes
        self._version: str | None = None
        self._tasks: dict[str, asyncio.Task[Output]] = {}
        self._updating = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        meeting: Meeting,
        num_replicas: int,
        *,
        vocab_size: int,
        seconds: float = 3600.0,
        patience: FleetPatience | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        tell: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Wait until every engine has come up once, without weights, or was given up.

        Args:
            meeting: of the job's start.
            num_replicas: of the run.
            vocab_size: ids of the model.
            seconds: that they may take; those that have not come up by then may come later.
            patience: from then on.
            bucket_bytes: of new weights, sent at once.
            tell: is called with what is waited for.

        Raises:
            UserError: none has come up.
        """
        patience, end = patience or FleetPatience(), time.monotonic() + seconds
        lengths, problems = [], []
        for index in range(num_replicas):
            try:
                lengths.append(await length_of(meeting, index, vocab_size, end, tell))
            except (UserError, EngineError) as problem:
                problems.append(str(problem))
                tell(f"going on without an engine: {problem}")
        if not lengths:
            raise UserError("; ".join(problems))
        limits = Limits(vocab_size, min(lengths), 4096)
        roster = Roster(meeting, num_replicas, limits, patience)
        await roster.look()
        return cls(roster, limits, patience, bucket_bytes)

    def check_grammar(self, grammar: str) -> None:
        """See the protocol: none, as behind any HTTP."""
        raise UserError("a grammar is not sent to engines behind HTTP; leave it out")

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See the protocol; the answer comes at once, from whichever engine gave it.

        Raises:
            UserError: also of a request with a grammar.
            EngineError: no engine could be asked for ``FleetPatience.away`` seconds.
        """
        check_request(request, self.limits)
        if request.grammar is not None:
            self.check_grammar(request.grammar)
        if request.id in self._tasks:
            raise UserError(f"request id {request.id!r} is in flight already")
        task = self._tasks[request.id] = asyncio.create_task(self._answer(request))
        try:
            output = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():  # not ``abort``: whoever asked has gone
                raise
            output = Output(finish_reason="abort")
        finally:
            self._tasks.pop(request.id, None)
            task.cancel()
        yield output

    async def _answer(self, request: Request) -> Output:
        tried: Replica | None = None
        last = ""
        for _ in range(NUM_TRIES):
            tried = await self._chosen(tried)
            version = self._version
            try:
                found = self._checked(await tried.answer(request), version)
                if found is not None:
                    return found
                last = f"{tried} answered by other weights than {version!r}, or not to its end"
            except EngineError as problem:
                last = str(problem)
            await asyncio.sleep(self._patience.again)
        raise EngineError(f"no answer to {request.id!r} in {NUM_TRIES} tries; at last {last}")

    def _checked(self, output: Output, version: str | None) -> Output | None:
        """The answer, with its version where the server says none; None: it is to be asked again.

        Weights that changed under it are told by the tokens' tags, or not at all.
        """
        if output.finish_reason == "abort" and self._roster.paused != "abort":
            return None  # an engine on its way down, or paused by somebody else
        is_same = version == self._version
        tags = {token.weight_version for token in output.tokens}
        if "" not in tags:
            return None if is_same and tags - {version} else output
        return tagged(output, version or "") if is_same else None

    async def _chosen(self, tried: Replica | None) -> Replica:
        """The least busy that can be asked, another than the one that just failed if there is."""
        began = time.monotonic()
        while True:
            if self._updating.locked():
                began = time.monotonic()
            elif askable := [each for each in self._roster if each.holds(self._version)]:
                others = [each for each in askable if each is not tried] or askable
                return min(others, key=lambda each: (each.num_running, each.num_answered))
            left = began + self._patience.away - time.monotonic()
            if left <= 0:
                raise EngineError(
                    f"no engine could be asked for {self._patience.away:g} seconds: "
                    f"{self._roster.told()}"
                )
            await self._roster.changed(left)

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """See the protocol; of this fleet's own requests."""
        wanted = list(self._tasks) if ids is None else ids
        for task in [self._tasks[name] for name in wanted if name in self._tasks]:
            task.cancel()

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See the protocol; engines that come back later are paused then."""
        await self._roster.pause(mode)

    async def resume(self) -> None:
        """See the protocol."""
        await self._roster.resume()

    async def sleep(self) -> None:
        """Give the GPUs back, see ``Roster.sleep``: a whole round is due afterwards."""
        await self._roster.sleep()

    async def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Take the GPUs again, see ``Roster.wake``."""
        await self._roster.wake(tag)

    def expect(self, version: str) -> None:
        """Ask for answers of these weights from here on: another fleet has sent them."""
        self._version = version
        self._roster.notify()

    def needs_weights(self) -> tuple[int, ...]:
        """Engines that are up and lack the version that is asked for, as last looked at."""
        up = self._roster.up()
        return tuple(each.address.index for each in up if not each.holds(self._version))

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: str,
        manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        """See the protocol; to all that are up or, of the version they have, to those that lack it.

        Whole where one engine at least has taken it whole: the others answer nothing until they
        have.

        Raises:
            UserError: there is no manifest.
            UpdateError: no engine has taken it whole.
        """
        if manifest is None:
            raise UserError("engines behind HTTP take weights with a manifest of them alone")
        try:
            async with self._updating:
                up = await self.some_up()
                is_again = version == self._version
                targets = [each for each in up if not (is_again and each.holds(version))]
                if targets:
                    await Sending(targets, version).send(weights, manifest, self._bucket_bytes)
                self._version = version
        finally:
            self._roster.notify()

    async def some_up(self) -> list[Replica]:
        """Those that can be sent weights, once there is one.

        Raises:
            UpdateError: none came in ``FleetPatience.away`` seconds.
        """
        began = time.monotonic()
        await self._roster.look()
        while not (up := self._roster.up()):
            if time.monotonic() - began > self._patience.away:
                raise UpdateError(
                    UpdateCode.ENGINE,
                    f"no engine came up in {self._patience.away:g} seconds: {self._roster.told()}",
                )
            await self._roster.changed(self._patience.look)
        return up

    async def look(self) -> None:
        """Look at every engine now, and not at the next second."""
        await self._roster.look()

    def health(self) -> Health:
        """See the protocol: ready while one of them can be asked."""
        is_ready = any(each.holds(self._version) for each in self._roster)
        version = NO_WEIGHTS if self._version is None else self._version
        detail = "" if is_ready else f"no engine can be asked: {self._roster.told()}"
        is_paused = self._roster.paused is not None
        return Health(is_ready, detail, is_paused, version, len(self._tasks), 0)

    async def close(self) -> None:
        """See the protocol; the engines themselves go on, they are their supervisors'."""
        await self.abort()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._roster.close()
