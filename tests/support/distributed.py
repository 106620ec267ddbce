"""Run a test's module on several ranks: one start-up of Megatron for many cases."""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from megatron_k2.host.repairs import installed_version
from tests.support.paths import REPOSITORY


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


BACKENDS = ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)]
"""The same test body on CPU over gloo, and on GPUs over NCCL (``pytest -m gpu``)."""


class ForkedRank:
    """A rank forked from the template, with ``Popen``'s methods."""

    def __init__(self, template: "Template", pid: int) -> None:
        self.template, self.pid = template, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or ``None`` while it runs."""
        if self.returncode is None:
            self.returncode = self.template.ask({"poll": self.pid})["code"]
        return self.returncode

    def wait(self) -> int:
        """The exit code, once it has ended."""
        while self.poll() is None:
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Template:
    """``tests/support/rank_template.py`` for this session: what has Megatron imported and forks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.rank_template"],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        atexit.register(self.end)

    def end(self) -> None:
        """Wait for it, so that its CPU seconds and its ranks' are counted with this process's.

        A closed pipe would not do: what this process forked holds it open too.
        """
        self._send({"end": True})
        self.process.wait()

    def _send(self, request: dict) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def ask(self, request: dict) -> dict:
        """One request, its answer."""
        assert self.process.stdout is not None
        self._send(request)
        return json.loads(self.process.stdout.readline())


@functools.cache
def template() -> Template:
    """One for all tests of this process; it ends with it, as its standard input does."""
    return Template()


def start_ranks(
    module: str,
    world_size: int,
    arguments: list[str],
    log_dir: Path,
    backend: str = "gloo",
    first_on_path: Path | None = None,
    stores: Sequence[TCPStore] = (),
):
    """Start ``python -m module arguments`` on every rank; their output goes to ``log_dir``.

    Rank 0 hosts the store in which they meet, or, as torchrun would, this process: the first of
    ``stores``; the others are for further cases (``tests.support.cases``).
    With ``gloo`` the ranks see no GPU, so they run on CPU on any machine; with ``nccl`` each takes
    one, and the test skips where there are too few. Packages in ``first_on_path`` come before the
    installed ones. Ranks are forked from a process that has Megatron imported, except where that
    cannot be: with CUDA, with other packages, or over Transformer Engine's stand-in, which a worker
    puts in place before Megatron looks for it.
    """
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} GPUs needed, {torch.cuda.device_count()} here")
    log_dir.mkdir(parents=True, exist_ok=True)
    ports = [str(store.port) for store in stores] or [str(free_port())]
    ranks = []
    search_path = [first_on_path, REPOSITORY, os.environ.get("PYTHONPATH")]
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": ports[0],
            "CASE_PORTS": ",".join(ports),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, search_path))),
        }
        if stores:
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        log = log_dir / f"rank{rank}.log"
        if backend == "gloo":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        has_te = installed_version("transformer-engine") is not None
        if backend == "gloo" and first_on_path is None and not has_te:
            own = {"environment": environment, "log": str(log)}
            answer = template().ask({"module": module, "arguments": arguments} | own)
            ranks.append(ForkedRank(template(), answer["pid"]))
        else:
            ranks.append(_started(module, arguments, environment, log))
    return ranks


def _started(module: str, arguments: list[str], environment: dict[str, str], log: Path):
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with the helpers Megatron starts, see end()
        )


def end(process) -> None:
    """End a rank and whatever it started (the checkpoint writer's manager outlives its parent)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(processes, log_dir: Path, timeout: float = 600.0) -> None:
    """Wait for every rank; the first that fails ends the others and is reported."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, p in enumerate(processes) if p.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            for process in processes:
                end(process)
            rank = failed[0] if failed else 0
            tail = (log_dir / f"rank{rank}.log").read_text()[-3000:]
            raise AssertionError(f"rank {rank} {'failed' if failed else 'timed out'}:\n{tail}")
        time.sleep(0.02)
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (log_dir / f"rank{rank}.log").read_text()[-3000:]


def run_ranks(
    module: str,
    world_size: int,
    payload: object,
    log_dir: Path,
    backend: str = "gloo",
    first_on_path: Path | None = None,
) -> None:
    """Run ``module`` on ``world_size`` ranks with one JSON file as its argument.

    A worker of many cases runs each in a process of its own: ``tests.support.cases.run_each``.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / "payload.json"
    path.write_text(json.dumps(payload))
    num_cases = len(payload) if isinstance(payload, list) else 1
    stores = [
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(num_cases)
    ]
    arguments = [str(path)]
    ranks = start_ranks(module, world_size, arguments, log_dir, backend, first_on_path, stores)
    wait_for(ranks, log_dir)
