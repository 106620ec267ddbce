"""Supervisors over stand-ins for vLLM: who dies, hangs, finds its port taken, fails for good.

The stand-in answers ``/health`` and has the flags of vLLM's command; real engines are started in
``test_fleet.py``. Not exercised: nodes that are other machines, and a follower that hangs.
"""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.rl.cluster.engines import members_of, read_engines
from megatron_k2.rl.cluster.fleet import Fleet
from megatron_k2.rl.cluster.rendezvous import Meeting, free_port
from megatron_k2.rl.cluster.supervisor import Node, Supervisor
from tests.rl.cluster.supervising import (
    HOST,
    STAND_IN,
    Supervised,
    engines_file,
    is_running,
    until,
)


def stand_ins(folder, **more):
    model = {"preset": "k2-tiny", "tokenizer": str(folder)}
    row = {"backend": "vllm", "replicas": 1, "model": model, "options": {}} | more
    row["options"] = {"python": str(STAND_IN)} | row["options"]
    return engines_file(folder, row)


def test_one_that_dies_or_hangs_is_started_again_elsewhere(tmp_path):
    engines, run = stand_ins(tmp_path), sha256_of_json(str(tmp_path))[:12]
    left = tmp_path / "weights" / f"megatron-k2.{run}.6.0.node.0"
    others = tmp_path / "weights" / "megatron-k2.another-run.6.0.node.0"
    for each in (left, others):
        each.mkdir()
        (each / "bucket").write_text("weights")
    with Supervised(tmp_path / "7.0", engines) as run:
        first = run.engine(0)
        weights = Path(first.details["weights"])
        assert weights.stat().st_mode & 0o777 == 0o700
        assert not left.exists(), "of an earlier start of this run"
        assert others.exists()
        os.kill(first.details["pid"], signal.SIGKILL)
        second = run.engine(0, attempt=1)
        assert second.details["pid"] != first.details["pid"]
        os.kill(second.details["pid"], signal.SIGSTOP)
        third = run.engine(0, attempt=2)
        assert not is_running(second.details["pid"])
    attempts = run.meeting.attempts("replica.0")
    assert "ended by SIGKILL" in attempts[1].why
    assert "is wedged, and is killed" in attempts[2].why
    assert not is_running(third.details["pid"]), "SIGTERM ends it with its supervisor"
    assert run.processes[0].returncode == 0
    assert list((tmp_path / "weights").iterdir()) == [others]


def test_a_replica_over_two_nodes_is_started_again_as_one(tmp_path):
    disk = tmp_path / "disk" / "weights"
    shared = {"weights_are_shared": True, "weights_directory": str(disk)}
    engines = stand_ins(tmp_path, nodes_per_replica=2, gpus_per_node=2, **shared)

    def logged(run, rank, attempt):
        path = run.meeting.directory / "logs" / f"engine.0.{rank}.{attempt}.log"
        return until(lambda: path.exists() and "flags" in (text := path.read_text()) and text)

    with Supervised(tmp_path / "7.0", engines, nodes=2) as run:
        leader = run.engine(0)
        said = logged(run, 1, 0)
        lead = run.meeting.read("lead", 0)
        assert f"'data_parallel_rpc_port': {lead.port}" in said
        assert f"'data_parallel_rpc_port': {lead.port}" in logged(run, 0, 0)
        follower = until(lambda: pid_of("--headless", run.meeting.directory))
        os.kill(follower, signal.SIGKILL)
        again = run.engine(0, attempt=1)
        assert not is_running(leader.details["pid"])
        lead = run.meeting.read("lead", 0)
        assert lead.attempt == 1
        assert f"'data_parallel_rpc_port': {lead.port}" in logged(run, 1, 1)
        os.kill(again.details["pid"], signal.SIGKILL)
        run.engine(0, attempt=2)
        assert "'data_parallel_start_rank': 2" in logged(run, 1, 2)
        follower = until(lambda: pid_of("--headless", run.meeting.directory))
        os.kill(follower, signal.SIGSTOP)
        run.engine(0, attempt=3)
        assert not is_running(follower)
        (weights,) = disk.iterdir()
        assert again.details["weights"] == str(weights), "one for both nodes"
    assert list(disk.iterdir()) == []
    whys = [each.why for each in run.meeting.attempts("replica.0")]
    assert whys[1].startswith("engine.0.1: process")
    assert whys[2].startswith("engine.0.0: process")
    assert "wedged, and is killed: it is stopped" in whys[3]


def pid_of(word, meet):
    """A process with this word, that one of the meeting's supervisors started."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    words = file.read().decode().split("\0")
            except OSError:
                continue
            if word in words and any(w.startswith(str(meet)) for w in words):
                return int(entry.name)
    return None


def test_a_supervisor_that_is_killed_takes_its_engines_and_its_successor_starts_new_ones(tmp_path):
    with Supervised(tmp_path / "7.0", stand_ins(tmp_path, replicas=2)) as run:
        pids = [run.engine(i).details["pid"] for i in range(2)]
        run.processes.pop(0).kill()
        until(lambda: not any(map(is_running, pids)))
        run.start(0)
        for index in range(2):
            assert run.engine(index, attempt=1).details["pid"] not in pids
    assert "was started again" in run.meeting.attempts("replica.1")[1].why


def test_what_never_works_is_given_up_with_a_sentence(tmp_path):
    patience = {"restarts": 2}
    engines = stand_ins(tmp_path, options={"flags": ["--fails"]}, patience=patience)
    run = Supervised(tmp_path / "7.0", engines)
    run.start(0)
    assert run.processes[0].wait(30) == 2
    said = run.said()
    assert "supervisor: replica.0 was started again 2 times within 1800 seconds" in said
    assert "no CUDA device is left" in said.splitlines()[-1]
    assert "Traceback" not in said
    with pytest.raises(UserError, match=r"engine 0 was given up: replica\.0 was started again 2"):
        asyncio.run(Fleet.open(run.meeting, 1, vocab_size=9))


def test_an_occupied_port_and_a_file_of_another_start_are_survived(tmp_path):
    """The port was free when it was chosen; somebody else has it by the time it is bound."""
    engines = read_engines(stand_ins(tmp_path))
    meeting, told = Meeting(tmp_path / "7.1"), []
    Meeting(tmp_path / "7.0").publish("engine", 0, HOST, 1)
    stale = (tmp_path / "7.0" / "engine.0.json").read_bytes()
    (meeting.directory / "engine.0.json").write_bytes(stale)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        ports = [taken.getsockname()[1]]
        node = Node(meeting, 0, HOST, lambda h: ports.pop() if ports else free_port(h), told.append)

        async def scenario():
            supervisor = Supervisor(node, engines, members_of(engines, 0, 1))
            task = asyncio.create_task(supervisor.run())
            found = await meeting.wait("engine", 0, 30)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return found

        found = asyncio.run(scenario())
        assert found.port != taken.getsockname()[1]
        assert (found.generation, found.attempt) == ("7.1", 1)
    assert "Address already in use" in told[0]


def test_engines_wait_for_what_they_are_started_after(tmp_path):
    with Supervised(tmp_path / "7.0", stand_ins(tmp_path, after="trainer")) as run:
        until(lambda: run.meeting.read("supervisor", 0))
        with pytest.raises(UserError):
            asyncio.run(run.meeting.wait("engine", 0, 1.0))
        run.meeting.publish("trainer", 0, HOST, 0)
        run.engine(0)
