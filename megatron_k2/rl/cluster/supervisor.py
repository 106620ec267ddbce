"""A task on each node with engines: ``python -m megatron_k2.rl.cluster.supervisor --meet DIR ...``.

It starts the node's engine processes, publishes where the leaders listen, and watches: a process
that ends, or a leader whose ``/health`` does not answer in time, is killed and started again, on
other ports, after a wait that grows. The processes of a replica that spans nodes are started again
together: whoever sees one fail raises the replica's count of attempts in the meeting folder, and
every supervisor follows it. One that fails too often ends the supervisor, with a sentence.

A follower has no health of its own: one that is stopped is seen, one that hangs only where its
leader hangs with it.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.rl.cluster import probe, program
from megatron_k2.rl.cluster.commands import Place, command_of
from megatron_k2.rl.cluster.engines import (
    KIND,
    Engines,
    Member,
    attempts_name,
    members_of,
    model_directory,
    read_engines,
)
from megatron_k2.rl.cluster.processes import Child, start
from megatron_k2.rl.cluster.rendezvous import Attempt, Meeting, free_port, own_host

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher of ranks sets, and an engine must not take for itself."""
AFTER_SECONDS = 24 * 3600.0
"""For what engines are started after: a trainer's start ends by itself, or by the job's limit."""


@dataclass(frozen=True)
class Node:
    """Where a supervisor works.

    Args:
        meeting: of the job's start.
        number: of the node among those with engines.
        host: by which others reach it.
        choose_port: of an address.
        tell: is called with what happens.
    """

    meeting: Meeting
    number: int
    host: str
    choose_port: Callable[[str], int] = free_port
    tell: Callable[[str], None] = lambda _: None

    @property
    def private(self) -> Path:
        """A directory that its owner alone reads."""
        return self.meeting.directory / f"node.{self.number}"


class Supervisor:
    """See the module.

    Args:
        node: where.
        engines: of the run.
        members: that run here.

    Raises:
        UserError: a command cannot be made of what the engines' file says.
    """

    def __init__(self, node: Node, engines: Engines, members: Sequence[Member]) -> None:
        self._node, self._meeting, self._engines = node, node.meeting, engines
        self._members, self._patience = members, engines.patience
        self._token = node.meeting.token()
        node.private.mkdir(mode=0o700, exist_ok=True)
        (node.meeting.directory / "logs").mkdir(mode=0o700, exist_ok=True)
        self._model = model_directory(engines, node.private / "model")
        nowhere = Place(
            node.host, 1, node.host, 1, self._model, engines.weights_under, node.private
        )
        for member in members:
            command_of(engines, member, nowhere, self._token)

    async def run(self) -> None:
        """Until it is cancelled, or gives up.

        Raises:
            UserError: a replica failed too often.
        """
        again = self._meeting.publish("supervisor", self._node.number, self._node.host, 0).attempt
        if again:  # what an earlier one started has ended with it
            for member in self._members:
                name = attempts_name(member.replica)
                number = self._meeting.attempts(name)[-1].number
                why = f"the supervisor of node {self._node.number} was started again"
                self._meeting.fail(name, number, why)
        if self._engines.after:
            await self._meeting.wait(self._engines.after, 0, AFTER_SECONDS, tell=self._node.tell)
        with self._weights_directory() as weights:
            async with probe.session() as client, asyncio.TaskGroup() as group:
                for member in self._members:
                    group.create_task(self._keep(member, weights, client))

    async def _keep(self, member: Member, weights: Path, client: Any) -> None:
        """One process after another."""
        name = attempts_name(member.replica)
        while True:
            attempts = self._meeting.attempts(name)
            await self._wait_before(name, attempts)
            attempt = attempts[-1]
            try:
                place = await self._place(member, attempt, weights)
                why = await self._lived(member, attempt, place, client)
            except UserError as problem:  # of this attempt; what never works was refused before
                why = str(problem)
            self._node.tell(f"{member.name}, attempt {attempt.number}: {why}")
            self._meeting.fail(name, attempt.number, f"{member.name}: {why}")

    async def _wait_before(self, name: str, attempts: Sequence[Attempt]) -> None:
        """The wait before an attempt, longer for each one that has failed lately.

        Raises:
            UserError: too many have.
        """
        patience, now = self._patience, time.time()
        recent = [each for each in attempts if each.number and now - each.at < patience.window]
        if len(recent) > patience.restarts:
            why = (
                f"{name} was started again {patience.restarts} times within {patience.window:g} "
                f"seconds, and failed once more: {recent[-1].why}"
            )
            self._meeting.give_up(name, why)
            raise UserError(why)
        if recent:
            seconds = min(patience.most_backoff, patience.backoff * 2 ** (len(recent) - 1))
            await asyncio.sleep(max(0.0, recent[-1].at + seconds - now))

    async def _lived(self, member: Member, attempt: Attempt, place: Place, client: Any) -> str:
        """Start a process, watch it; why it is of no use any longer, once it has ended."""
        command = command_of(self._engines, member, place, self._token)
        for path, content in command.files.items():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(content)
        log = self._meeting.directory / "logs" / f"{member.name}.{attempt.number}.log"
        own = {k: v for k, v in os.environ.items() if k not in _OF_RANKS}
        if command.words[0] != sys.executable:
            own.pop("PYTHONPATH", None)  # of this interpreter
        child = await start(command.words, own | dict(command.environment), log)
        seconds = 0.0
        try:
            return await self._watched(member, attempt, place, child, client)
        except asyncio.CancelledError:
            seconds = self._patience.end
            raise
        finally:
            await child.end(seconds)

    async def _place(self, member: Member, attempt: Attempt, weights: Path) -> Place:
        node = self._node
        port = node.choose_port(node.host)
        found = Place(node.host, port, node.host, port, self._model, weights, node.private)
        if self._engines.nodes_per_replica == 1:
            return found
        if member.is_leader:
            lead_port = node.choose_port(node.host)
            self._meeting.publish(
                "lead", member.replica, node.host, lead_port, attempt=attempt.number
            )
            return replace(found, lead_port=lead_port)
        lead = await self._meeting.wait(
            "lead", member.replica, self._patience.start, attempt=attempt.number, tell=node.tell
        )
        return replace(found, lead_host=lead.host, lead_port=lead.port)

    async def _watched(
        self, member: Member, attempt: Attempt, place: Place, child: Child, client: Any
    ) -> str:
        """Why the process is of no use any longer."""
        patience, is_up = self._patience, False
        url = f"http://{place.host}:{place.port}"
        heard = time.monotonic()
        ended = asyncio.create_task(child.ended())
        try:
            while not (await asyncio.wait({ended}, timeout=patience.look))[0]:
                newest = self._meeting.attempts(attempts_name(member.replica))[-1]
                if newest.number > attempt.number:
                    return f"started again with its replica: {newest.why}"
                if member.is_leader:
                    seen = await probe.look(client, url, self._token, patience.silent)
                else:
                    seen, is_up = _still(child), True
                now = time.monotonic()
                if seen.is_alive and not is_up:
                    is_up = True
                    self._publish(member, attempt, place, child)
                if seen.is_alive:
                    heard = now
                elif now - heard > (patience.silent if is_up else patience.start):
                    return _silence(child, seen, is_up, now - heard)
            return ended.result()
        finally:
            ended.cancel()

    def _publish(self, member: Member, attempt: Attempt, place: Place, child: Child) -> None:
        details = {"pid": child.pid, "backend": self._engines.backend}
        self._meeting.publish(
            KIND,
            member.replica,
            place.host,
            place.port,
            attempt=attempt.number,
            details=details | {"weights": str(place.weights)},
        )
        self._node.tell(f"{member.name}, attempt {attempt.number}: at {place.host}:{place.port}")

    @contextlib.contextmanager
    def _weights_directory(self) -> Iterator[Path]:
        """Where new weights come in; what earlier starts of this run left there is removed."""
        under, meet = self._engines.weights_under, self._meeting.directory
        is_shared = self._engines.weights_are_shared
        under.mkdir(mode=0o700, parents=True, exist_ok=True)
        node = "shared" if is_shared else f"node.{self._node.number}"
        run = sha256_of_json(str(meet.parent))[:12]
        found = under / f"megatron-k2.{run}.{self._meeting.generation}.{node}"
        for left in under.glob(f"megatron-k2.{run}.*.{node}"):
            if not is_shared or left != found:  # other supervisors may be at it
                shutil.rmtree(left, ignore_errors=is_shared)
        found.mkdir(mode=0o700, exist_ok=is_shared)
        try:
            yield found
        finally:
            if is_shared:
                with contextlib.suppress(OSError):  # the last one finds it empty
                    found.rmdir()
            else:
                shutil.rmtree(found, ignore_errors=True)


def _still(child: Child) -> probe.Probe:
    """A look at one without HTTP: it is alive unless it is stopped."""
    return probe.Probe(not child.is_stopped, False, None, "it is stopped")


def _silence(child: Child, seen: probe.Probe, is_up: bool, seconds: float) -> str:
    if is_up:
        return f"process {child.pid} is wedged, and is killed: {seen.detail}, {seconds:.0f} s now"
    return f"process {child.pid} did not come up in {seconds:.0f} seconds: {seen.detail}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="supervisor", description=__doc__.partition(":")[0])
    add, environment = parser.add_argument, os.environ
    add("--meet", type=Path, required=True, metavar="DIR", help="meeting folder of this start")
    add("--engines", type=Path, required=True, metavar="FILE", help="what to start (docs/rl.md)")
    node = int(environment.get("SLURM_PROCID", 0))
    add("--node", type=int, default=node, help="of those with engines (default: SLURM_PROCID)")
    nodes = int(environment.get("SLURM_NTASKS", 1))
    add("--nodes", type=int, default=nodes, help="that have engines (default: SLURM_NTASKS)")
    add("--host", help="address to listen on (default: that of this node's name)")
    return parser


async def _supervise(arguments: argparse.Namespace) -> None:
    engines = read_engines(arguments.engines)
    members = members_of(engines, arguments.node, arguments.nodes)

    def tell(text: str) -> None:
        print(f"supervisor {arguments.node}: {text}", flush=True)

    node = Node(Meeting(arguments.meet), arguments.node, own_host(arguments.host), tell=tell)
    await Supervisor(node, engines, members).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise a node's engines until SIGTERM; the exit code."""
    return program.run("supervisor", _supervise(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
