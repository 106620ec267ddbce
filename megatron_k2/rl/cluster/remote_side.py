"""Rank 0's side of a run with ``--meet``: the controller collects, engines elsewhere answer.

Rank 0 asks the controller in short questions, so that who has gone is noticed. Groups come from the
ledger, which the controller writes and this process reads. Weights go from here to the engines
directly, by a fleet of their addresses.
"""

import asyncio
import contextlib
import json
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from megatron_k2.engine.check import drawn_probes, require_version, scored_by
from megatron_k2.engine.protocol import EngineError
from megatron_k2.engine.remote.engine import RemoteEngine
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset
from megatron_k2.records.rollouts import End
from megatron_k2.rl.cluster.controller import COME_SECONDS
from megatron_k2.rl.cluster.controller import KIND as CONTROLLER
from megatron_k2.rl.cluster.engines import KIND as ENGINE
from megatron_k2.rl.cluster.engines import read_engines
from megatron_k2.rl.cluster.fleet import Fleet
from megatron_k2.rl.cluster.rendezvous import Address, Meeting, own_host
from megatron_k2.rl.cluster.replica import endpoint_of
from megatron_k2.rl.handed_out import LedgerReader
from megatron_k2.rl.lessons import LessonMaker
from megatron_k2.rl.loop import Collected, Side
from megatron_k2.rl.record import Group, Segment, Trajectory
from megatron_k2.rl.side import FOLDER, LEDGER, check_position, lesson_maker, read_basis
from megatron_k2.rl.waiting import LostError

try:
    import aiohttp
except ImportError:  # the extra "remote"
    aiohttp = None  # type: ignore[assignment]

TRAINER = "trainer"
"""What rank 0 publishes itself as, when its model is loaded: engines on its GPUs start then."""
SILENT_SECONDS = 60.0
"""Choice: the controller's event loop is busy for seconds where a large iteration is cut."""
_PAUSE_SECONDS = 0.2


class Asker:
    """One client of the controller's verbs.

    Args:
        address: that it published.
        token: of the meeting.
        silent_seconds: without any answer, after which it is lost.
    """

    def __init__(
        self, address: Address, token: str, silent_seconds: float = SILENT_SECONDS
    ) -> None:
        self._address, self._silent_seconds = address, silent_seconds
        timeout = aiohttp.ClientTimeout(total=silent_seconds)
        headers = {"Authorization": f"Bearer {token}"}
        self._session = aiohttp.ClientSession(timeout=timeout, headers=headers)

    async def ask(self, verb: str, **values: int) -> dict[str, Any]:
        """Its answer; a connection that broke is tried once more, since it may have been idle.

        Raises:
            LostError: it gives none.
        """
        problem: Exception = TimeoutError()
        for _ in range(2):
            try:
                async with self._session.post(f"{self._address.url}/{verb}", json=values) as answer:
                    content = await answer.read()
                    if answer.status != 200:
                        raise LostError(f"{self._who()}: {verb}: {content[:300].decode()}")
                    found: dict[str, Any] = json.loads(content)
                    return found
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                problem = error
                await asyncio.sleep(_PAUSE_SECONDS)
        said = f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
        raise LostError(
            f"{self._who()} gives no answer ({said}); what it has finished is in the ledger, and "
            "another start of the run goes on from there"
        )

    def _who(self) -> str:
        return f"the controller (host {self._address.host}, pid {self._address.pid})"

    async def close(self) -> None:
        """End its connections."""
        await self._session.close()


class Controlled:
    """A run's collector, in another process; see ``rl/loop.py``'s ``Collector``.

    Args:
        asker: of the controller.
        ledger: that it writes.
        fleet: by which weights go to the engines.
        probe: of the engines.
        maker: of the critic's lessons, which are those that the controller measures.
        is_shared: engines lie on the trainer's GPUs: they sleep whenever it is awake, and lose
            their weights.
    """

    def __init__(
        self,
        asker: Asker,
        ledger: LedgerReader,
        fleet: Fleet,
        probe: "Probe",
        maker: LessonMaker | None = None,
        *,
        is_shared: bool = False,
    ) -> None:
        self._asker, self._ledger, self._probe, self._maker = asker, ledger, probe, maker
        self._fleet, self._is_shared = fleet, is_shared

    async def ready(self) -> None:
        """Until an engine is up and has room for weights."""
        await self._fleet.some_up()
        if self._is_shared:
            await self._fleet.wake("weights")

    @contextlib.asynccontextmanager
    async def _awake(self) -> AsyncIterator[None]:
        """Engines have all of the memory meanwhile."""
        if not self._is_shared:
            yield
            return
        await self._fleet.wake("kv_cache")
        await self._fleet.resume()
        try:
            yield
        finally:
            await self._fleet.sleep()

    async def probes(self, version: int) -> tuple[Group, ...]:
        """Texts as every engine scored them, for the trainer to score them too."""
        async with self._awake():
            return await self._probe.groups(version)

    async def collect(self, iteration: int, version: int) -> Collected | None:
        """From the ledger, once the controller says that it is there; ``None``: weights are due.

        Raises:
            UserError: the controller refuses something.
            LostError: it failed, or has gone.
        """
        async with self._awake():
            return await self._collected(iteration, version)

    async def _collected(self, iteration: int, version: int) -> Collected | None:
        while True:
            begin = time.monotonic()
            said = await self._asker.ask("collect", iteration=iteration, version=version)
            match said["state"]:
                case "update":
                    return None
                case "done":
                    return self._read(iteration, version, said)
                case "refused":
                    raise UserError(said["detail"])
                case "failed":
                    raise LostError(f"the controller failed: {said['detail']}")
            await asyncio.sleep(max(0.0, begin + _PAUSE_SECONDS - time.monotonic()))

    def _read(self, iteration: int, version: int, said: dict[str, Any]) -> Collected:
        self._ledger.look()
        if iteration >= self._ledger.num_iterations:
            raise LostError(
                f"the controller has written iteration {iteration}, and the ledger here shows "
                f"{self._ledger.num_iterations}: --save lies on a disk that both must see at once"
            )
        self._ledger.check_position(said["position"])
        found = self._ledger.iteration(iteration, is_replayed=False)
        assert found.version == version  # the collector's own check
        lessons = () if self._maker is None else self._maker.make(iteration, found.groups).packs
        return Collected(found.groups, said["metrics"], said["position"], lessons)

    async def committed(self, iteration: int) -> None:
        """Old payloads may go; if the controller has gone, the next question finds that out."""
        try:
            await self._asker.ask("committed", iteration=iteration)
        except LostError as error:
            print(error, flush=True)

    async def close(self) -> None:
        """The controller ends with the run."""
        try:
            await self._asker.ask("close")
        except LostError as error:  # the run has ended; that it went first is no news
            print(error, flush=True)
        finally:
            await self._asker.close()
            await self._fleet.close()


class Probe:
    """Asks every engine for the log-probabilities of drawn texts, and of its answers to them.

    Args:
        meeting: in which they have published themselves.
        num_engines: of the run.
        vocab_size: ids of the model.
        seed: of the texts.
    """

    def __init__(self, meeting: Meeting, num_engines: int, vocab_size: int, seed: int) -> None:
        self._meeting, self._num_engines = meeting, num_engines
        self._vocab_size, self._seed = vocab_size, seed

    async def groups(self, version: int) -> tuple[Group, ...]:
        """A group an engine; rewards differ so that nothing takes it for a dead one.

        One that has not come up, or has died since it got its weights, is passed over.

        Raises:
            UserError: an engine answers with other weights.
            EngineError: none answers.
        """
        found, problems = [], []
        for index in range(self._num_engines):
            try:
                if (address := self._meeting.read(ENGINE, index)) is None:
                    raise EngineError("it has not come up")
                found.append(await self._of(index, address, version))
            except EngineError as problem:
                problems.append(f"engine {index} was not compared: {problem}")
                print(f"rl: {problems[-1]}", flush=True)
        if not found:
            raise EngineError("; ".join(problems))
        return tuple(found)

    async def _of(self, index: int, address: Address, version: int) -> Group:
        endpoint = endpoint_of(address, self._meeting.token_path)
        engine = await RemoteEngine.connect(
            [endpoint], vocab_size=self._vocab_size, version=str(version)
        )
        try:
            scored = await scored_by(engine, drawn_probes(self._vocab_size, self._seed))
        finally:
            await engine.close()
        require_version(scored, str(version))
        rows = [
            Trajectory(
                (Segment(one.ids[:1]), Segment(one.ids[1:], one.logprobs, version, 1.0)),
                float(number % 2),
                {},
                End.OVER,
            )
            for number, one in enumerate(scored)
        ]
        return Group(index, "probe", f"engine {index} at {address.url}", tuple(rows))


async def make_side(args: Namespace, preset: ModelPreset, iteration: int) -> Side:
    """The controller and the engines of this start, once they are there.

    Args:
        args: Megatron's and ours, with ``--meet`` and ``--engines``.
        preset: of the model.
        iteration: that the learner goes on with.

    Raises:
        UserError: one did not come up, or the ledger is not the checkpoint's.
    """

    def tell(text: str) -> None:
        print(f"rl: {text}", flush=True)

    if aiohttp is None:
        raise UserError("aiohttp is not installed; pip install 'megatron-k2[remote]'")
    meeting = Meeting(Path(args.meet))
    meeting.publish(TRAINER, 0, own_host(args.host), 0)
    address = await meeting.wait(CONTROLLER, 0, COME_SECONDS, tell=tell)
    engines, vocab_size = read_engines(Path(args.engines)), preset.vocab_size
    fleet = await Fleet.open(meeting, engines.replicas, vocab_size=vocab_size, tell=tell)
    folder = Path(args.save) / FOLDER
    ledger = LedgerReader(folder / LEDGER)
    check_position(ledger, folder, iteration)
    probe = Probe(meeting, engines.replicas, vocab_size, args.seed)
    asker = Asker(address, meeting.token())
    maker = lesson_maker(args, read_basis(args, vocab_size))
    collector = Controlled(asker, ledger, fleet, probe, maker, is_shared=engines.colocated)
    return Side(collector, fleet)
