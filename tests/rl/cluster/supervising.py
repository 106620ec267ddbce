"""Supervisors as real processes over a meeting folder, and what is looked at from outside."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_k2.rl.cluster.rendezvous import Meeting

HOST = "127.0.0.1"
STAND_IN = Path(__file__).parent / "stand_in.py"
QUICK = {"look": 0.1, "silent": 8, "start": 180, "backoff": 0.05, "most_backoff": 0.2, "end": 2}


def until(found, seconds=90.0):
    """What ``found()`` gives once it is something."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)
    return value


def is_running(pid):
    """Whether a process is there and no zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX"


def engines_file(folder, row):
    """A file as a launch script writes it."""
    (folder / "weights").mkdir(exist_ok=True)
    whole = {"weights_directory": str(folder / "weights")} | row
    whole["patience"] = QUICK | row.get("patience", {})
    path = folder / "engines.json"
    path.write_text(json.dumps(whole))
    return path


class Supervised:
    """Supervisors of one meeting, ended with the block."""

    def __init__(self, meet, engines, nodes=1):
        self.meeting, self.engines, self.nodes = Meeting(meet), engines, nodes
        self.processes = {}

    def __enter__(self):
        for node in range(self.nodes):
            self.start(node)
        return self

    def start(self, node):
        command = [sys.executable, "-m", "megatron_k2.rl.cluster.supervisor", "--host", HOST]
        command += ["--meet", str(self.meeting.directory), "--engines", str(self.engines)]
        command += ["--node", str(node), "--nodes", str(self.nodes)]
        log = (self.meeting.directory / f"supervisor.{node}.log").open("ab")
        environment = os.environ | {"RANK": "0", "MASTER_ADDR": "x", "OMP_NUM_THREADS": "1"}
        self.processes[node] = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )

    def said(self, node=0):
        return (self.meeting.directory / f"supervisor.{node}.log").read_text()

    def engine(self, index, attempt=0, seconds=180.0):
        """The address of an engine, of this attempt at least."""

        def found():
            for process in self.processes.values():
                assert process.poll() in (None, 0), self.said()
            with contextlib.suppress(ValueError):
                address = self.meeting.read("engine", index)
                return address if address and address.attempt >= attempt else None

        return until(found, seconds)

    def __exit__(self, *_error):
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            finally:
                process.kill()
