"""Environments in a service of its own: the same episodes, and what happens where it dies.

Most is tried over a real service process, killed and started again; what hangs on the clock over
``Episodes`` itself. Not exercised: services on other machines.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("aiohttp", reason="needs the extra remote")
pytest.importorskip("fastapi", reason="needs the extra serve")

import aiohttp

from megatron_k2.errors import UserError
from megatron_k2.gym.episode import Action, Again, Bounds, play
from megatron_k2.gym.protocol import Outcome, Task
from megatron_k2.records.messages import Message
from megatron_k2.records.rollouts import End
from megatron_k2.rl.cluster.gym_client import (
    GymClient,
    GymPatience,
    ServiceError,
    _LostError,
)
from megatron_k2.rl.cluster.gym_episodes import Episodes, Refused
from megatron_k2.rl.cluster.remote_domain import remote_domains
from megatron_k2.rl.cluster.rendezvous import Meeting
from tests.rl.cluster.gym_domain import NAME, Counting
from tests.rl.cluster.supervising import HOST, until

QUICK = GymPatience(away=20, again=0.05)
TALK = Task(NAME, "count", {"turns": 3, "answer": "x"})


class Service:
    """One real service, started as often as asked."""

    def __init__(self, folder):
        self.meeting, self.log = Meeting(folder / "7.0"), folder / "closed.log"
        tasks = folder / "tasks.jsonl"
        tasks.write_text(json.dumps(TALK.as_json()) + "\n")
        sets = {"task_sets": [{"name": "a", "tasks": tasks.name, "max_tokens": 9}]}
        self.sets = folder / "sets.json"
        self.sets.write_text(json.dumps(sets))
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "megatron_k2.rl.cluster.gym_service", "--host", HOST]
        command += ["--meet", str(self.meeting.directory), "--tasks", str(self.sets)]
        before = self.meeting.read("gym", 0)
        environment = os.environ | {"GYM_DOMAIN_LOG": str(self.log)}
        self.process = subprocess.Popen(command, env=environment)
        attempt = 0 if before is None else before.attempt + 1

        def found():
            assert self.process.poll() is None
            address = self.meeting.read("gym", 0)
            return address if address is not None and address.attempt == attempt else None

        return until(found, 60)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    found = Service(tmp_path_factory.mktemp("gym"))
    found.start()
    yield found
    found.process.send_signal(signal.SIGTERM)
    assert found.process.wait(20) == 0


def scenario(service, body):
    """``body(domain, client)`` over the service."""

    async def whole():
        client = GymClient(service.meeting, patience=QUICK)
        try:
            domains = await remote_domains([NAME], client)
            return await asyncio.wait_for(body(domains[NAME], client), 60)
        finally:
            await client.close()

    return asyncio.run(whole())


async def count(view):
    """A policy that counts."""
    turn = sum(message.role == "assistant" for message in view.messages)
    return Action(Message("assistant", str(turn)))


def essence(rollout):
    return replace(rollout, seconds={})


async def health(client):
    address = await client.choose()
    async with aiohttp.ClientSession() as session, session.get(f"{address.url}/health") as answer:
        return await answer.json()


def test_an_episode_is_the_same_here_and_there(service):
    here = asyncio.run(play(count, Counting().environment(), TALK))

    async def body(domain, client):
        there = await play(count, domain.environment(), TALK)
        verdicts = [(await domain.judge(TALK, answer)).outcome for answer in "xy"]
        return there, verdicts, domain.name

    there, verdicts, name = scenario(service, body)
    assert essence(there) == essence(here)
    assert there.outcome == "right"
    assert (verdicts, name) == ([Outcome.RIGHT, Outcome.WRONG], NAME)


def test_without_the_token_there_is_nothing(service):
    async def body(_domain, client):
        address = await client.choose()
        async with aiohttp.ClientSession() as session:
            for path in ("/judge", "/close", "/episodes/a/reset", "/episodes/a/step"):
                for headers in ({}, {"Authorization": "Bearer another"}):
                    async with session.post(address.url + path, json={}, headers=headers) as answer:
                        assert answer.status == 401
        return await health(client)

    assert scenario(service, body)["domains"] == [NAME]


def test_a_step_whose_answer_was_lost_is_not_told_twice(service):
    async def body(domain, client):
        environment, once, lost = domain.environment(), client._once, []

        async def losing(address, path, content, seconds=None):
            found = await once(address, path, content, seconds)
            if path.endswith("/step") and content not in lost:
                lost.append(content)
                raise _LostError("cut")
            return found

        client._once = losing
        await environment.reset(TALK)
        steps = [await environment.step(Message("assistant", str(i))) for i in range(3)]
        assert len(lost) == 3
        assert [step.is_over for step in steps] == [False, False, True]
        verdict = await environment.verify()
        assert (verdict.outcome, verdict.details["heard"]) == (Outcome.RIGHT, 3)
        client._once = once
        return await careless(domain.environment())

    assert scenario(service, body).outcome is Outcome.WRONG


async def careless(environment):
    """The mistake: what was lost is sent again as if it were the next."""
    await environment.reset(TALK)
    for said in ("0", "0", "1", "2"):
        await environment.step(Message("assistant", said))
    return await environment.verify()


def test_what_an_environment_raises_is_its_failure(service):
    async def body(domain, _client):
        environment = domain.environment()
        await environment.reset(TALK)
        with pytest.raises(Again, match="a moment"):
            await environment.step(Message("assistant", "again"))
        assert (await environment.step(Message("assistant", "again"))).messages
        with pytest.raises(ServiceError, match="OSError: the disk is full"):
            await environment.step(Message("assistant", "fail"))
        with pytest.raises(UserError, match="before reset"):
            await domain.environment().step(Message("assistant", "0"))
        other = await domain.judge(replace(TALK, domain="mathematics"), "x")
        assert (other.outcome, "is not open here" in other.evidence) == (Outcome.UNKNOWN, True)

    scenario(service, body)


def test_a_service_killed_in_an_episode_fails_it_and_the_next_try_is_another(service):
    async def body(domain, client):
        async def policy(view):
            action = await count(view)
            if action.message.content == "1" and not killed:
                killed.append(True)
                service.kill()
            return action

        killed = []
        bounds = Bounds(num_tries=1, call_seconds=30)
        failed = await play(policy, domain.environment(), TALK, bounds)
        starting = asyncio.create_task(asyncio.to_thread(service.start))
        again = await play(policy, domain.environment(), TALK, bounds)
        address = await starting
        return failed, again, address, await health(client)

    failed, again, address, after = scenario(service, body)
    assert failed.end is End.ENVIRONMENT
    assert failed.reason.startswith("step raised GoneError: gym 0 at http://127.0.0.1:")
    assert (again.end, again.outcome) == (End.OVER, "right")
    assert address.attempt == 1
    assert after["domains"] == [NAME]


def test_one_that_dies_in_a_step_is_a_failure_in_time(service):
    async def body(domain, _client):
        environment = domain.environment()
        await environment.reset(TALK)
        with pytest.raises(ServiceError, match="gym 0 at http"):
            await environment.step(Message("assistant", "die"))

    scenario(service, body)
    service.process.wait(10)
    service.start()

    async def stale(domain, client):
        """An episode of the process before: its id means nothing to this one."""
        environment = domain.environment()
        await environment.reset(TALK)
        environment._name = "of-another"
        with pytest.raises(ServiceError, match="no episode 'of-another': it was closed"):
            await environment.step(Message("assistant", "0"))

    scenario(service, stale)


def test_dropped_episodes_are_closed(service, monkeypatch):
    monkeypatch.setattr("megatron_k2.rl.cluster.gym_client.TEND_SECONDS", 0.05)

    async def body(domain, client):
        before = service.log.read_text().count("closed") if service.log.exists() else 0
        environments = [domain.environment() for _ in range(5)]
        for environment in environments:
            await environment.reset(TALK)
        assert (await health(client))["episodes"] == 5
        await environments.pop().reset(TALK)  # the first of it is dropped for the second
        environments.clear()
        del environment  # nobody has the last one either
        while (await health(client))["episodes"]:
            await asyncio.sleep(0.05)
        return service.log.read_text().count("closed") - before

    assert scenario(service, body) == 6


def test_idle_episodes_are_closed_and_told_so():
    async def body():
        now = [0.0]
        episodes = Episodes({NAME: Counting()}, idle_seconds=10, clock=lambda: now[0])
        begun = {"task": TALK.as_json()}
        first = await episodes.reset("a", begun)
        assert await episodes.reset("a", begun) == first, "asked again, it is the same one"
        now[0] = 8
        action = {"role": "assistant", "content": "0"}
        said = await episodes.step("a", {"ordinal": 1, "action": action})
        assert await episodes.step("a", {"ordinal": 1, "action": action}) == said
        await episodes.reset("b", begun)
        now[0] = 17
        assert await episodes.sweep() == 0
        await episodes.step("b", {"ordinal": 1, "action": action})
        now[0] = 20
        assert await episodes.sweep() == 1
        with pytest.raises(Refused, match="had been idle for 10 seconds"):
            await episodes.step("a", {"ordinal": 2, "action": action})
        for ordinal, said in ((3, "step 3, and 1 was the last"), (0, "expected a number")):
            with pytest.raises(Refused, match=said):
                await episodes.step("b", {"ordinal": ordinal, "action": action})
        assert await episodes.close(["b", "c"]) == 1

    asyncio.run(body())


def test_a_step_under_way_is_not_begun_again_and_ends_with_its_episode():
    async def body():
        episodes = Episodes({NAME: Counting()})
        slow = replace(TALK, reference={"turns": 3, "seconds": 30}, id="")
        await episodes.reset("a", {"task": slow.as_json()})
        step = {"ordinal": 1, "action": {"role": "assistant", "content": "0"}}
        calls = [asyncio.create_task(episodes.step("a", step)) for _ in range(2)]
        await asyncio.sleep(0.05)
        talk = episodes._open["a"].environment
        assert talk.said == ["0"]
        with pytest.raises(Refused, match="step 2, and 1 is under way"):
            await episodes.step("a", {**step, "ordinal": 2})
        await episodes.close_all()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in ended] == [asyncio.CancelledError] * 2

    asyncio.run(body())


def test_domains_that_the_services_lack_are_refused_at_the_start(service):
    async def whole():
        client = GymClient(service.meeting, patience=QUICK)
        try:
            with pytest.raises(UserError, match="have no coding, logic; give them the same"):
                await remote_domains(["logic", NAME, "coding"], client)
        finally:
            await client.close()
        away = GymClient(service.meeting, 1, GymPatience(away=0.2, again=0.05))
        away._num_open = {7: 0}
        with pytest.raises(ServiceError, match=r"no gym service was up for 0\.2 seconds"):
            await away.choose()
        await away.close()

    asyncio.run(whole())
