"""The meeting folder: whole or absent, this generation's alone, one token, attempts that rise."""

import asyncio
import json
import multiprocessing
import os
import stat

import pytest

from megatron_k2.errors import UserError
from megatron_k2.rl.cluster.rendezvous import Meeting, own_host


def waited(meeting, *what, seconds=0.0, **more):
    return asyncio.run(meeting.wait(*what, seconds, **more))


def test_what_is_published_is_read_by_whoever_waits(tmp_path):
    meeting = Meeting(tmp_path / "7.0")
    assert meeting.read("engine", 0) is None

    async def both():
        waiting = asyncio.create_task(Meeting(tmp_path / "7.0").wait("engine", 0, 5))
        await asyncio.sleep(0.05)
        said = meeting.publish("engine", 0, "127.0.0.1", 8001, details={"replica": 1})
        return said, await waiting

    said, found = asyncio.run(both())
    assert said == found
    assert (found.generation, found.attempt, found.url) == ("7.0", 0, "http://127.0.0.1:8001")
    assert found.details == {"replica": 1}
    (path,) = meeting.directory.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(meeting.directory.stat().st_mode) == 0o700


def test_a_process_that_comes_back_has_a_higher_attempt(tmp_path):
    meeting = Meeting(tmp_path / "7.0")
    assert [meeting.publish("gym", 0, "h", port).attempt for port in (1, 2, 3)] == [0, 1, 2]
    assert waited(meeting, "gym", 0, attempt=2).port == 3
    with pytest.raises(UserError, match="attempt 2, which has failed"):
        waited(meeting, "gym", 0, attempt=3)


def test_a_file_of_another_start_is_refused_and_passed_over(tmp_path):
    Meeting(tmp_path / "7.0").publish("engine", 0, "h", 1)
    meeting = Meeting(tmp_path / "7.1")
    stale = (tmp_path / "7.0" / "engine.0.json").read_bytes()
    (meeting.directory / "engine.0.json").write_bytes(stale)
    with pytest.raises(UserError, match=r"of generation '7.0', left by another start.*'7.1'"):
        meeting.read("engine", 0)
    with pytest.raises(UserError, match=r"did not say where it listens in 0 seconds: .*'7.0'"):
        waited(meeting, "engine", 0)
    assert meeting.publish("engine", 0, "h", 2).attempt == 0
    assert waited(meeting, "engine", 0).port == 2


def test_one_that_asks_no_generation_would_take_it(tmp_path):
    """The mistake: what a reader does that trusts the file's name alone."""
    Meeting(tmp_path / "7.0").publish("engine", 0, "h", 1)
    stale = json.loads((tmp_path / "7.0" / "engine.0.json").read_bytes())
    assert stale["port"] == 1
    assert stale["generation"] != Meeting(tmp_path / "7.1").generation


@pytest.mark.parametrize("torn", [b"", b'{"generation": "7.0", "ki', b"[]", b"{}", b"\xff"])
def test_a_torn_file_is_waited_out(tmp_path, torn):
    meeting = Meeting(tmp_path / "7.0")
    (meeting.directory / "engine.0.json").write_bytes(torn)
    with pytest.raises(UserError, match="is not whole"):
        waited(meeting, "engine", 0)

    async def both():
        waiting = asyncio.create_task(meeting.wait("engine", 0, 5))
        await asyncio.sleep(0.05)
        meeting.publish("engine", 0, "h", 2)
        return await waiting

    assert asyncio.run(both()).port == 2


def test_whoever_waits_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_k2.rl.cluster.rendezvous.SAY_SECONDS", 0.1)
    said = []
    with pytest.raises(UserError, match=r"there is no .*engine\.3\.json"):
        waited(Meeting(tmp_path / "7.0"), "engine", 3, seconds=0.5, tell=said.append)
    assert said
    assert said[0].startswith("waiting for engine 3")


def _make_token(directory, gate, answers):
    gate.wait()
    answers.put(Meeting(directory).token())


def test_many_writers_make_one_token(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, answers = context.Event(), context.Queue()
    directory = tmp_path / "7.0"
    makers = [
        context.Process(target=_make_token, args=(directory, gate, answers)) for _ in range(8)
    ]
    for maker in makers:
        maker.start()
    gate.set()
    tokens = {answers.get(timeout=20) for _ in makers}
    for maker in makers:
        maker.join(20)
    meeting = Meeting(directory)
    assert tokens == {meeting.token()}
    assert stat.S_IMODE(meeting.token_path.stat().st_mode) == 0o600
    assert [path.name for path in directory.iterdir()] == ["token"], "no partial file is left"


def test_a_token_that_is_none_is_refused(tmp_path):
    meeting = Meeting(tmp_path / "7.0")
    meeting.token_path.write_text("")
    with pytest.raises(UserError, match="is no token"):
        meeting.token()


def test_attempts_rise_once_however_many_say_that_one_failed(tmp_path):
    one, other = Meeting(tmp_path / "7.0"), Meeting(tmp_path / "7.0")
    assert [each.number for each in one.attempts("replica.0")] == [0]
    one.fail("replica.0", 0, "its leader ended")
    other.fail("replica.0", 0, "its follower ended")
    found = other.attempts("replica.0")
    assert [(each.number, each.why) for each in found] == [(0, ""), (1, "its leader ended")]
    assert [each.number for each in one.attempts("replica.1")] == [0]


def test_the_address_to_listen_on(monkeypatch):
    assert own_host("10.0.0.3") == "10.0.0.3"
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    assert own_host() == "127.0.0.1"
    for everywhere in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match="address of one interface"):
            own_host(everywhere)
    monkeypatch.delenv("SLURMD_NODENAME")
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(UserError, match="give --host"):
        own_host()
