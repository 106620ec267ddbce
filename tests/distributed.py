"""Run a test's module on several ranks: one start-up of Megatron for many cases."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


BACKENDS = ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)]
"""The same test body on CPU over gloo, and on GPUs over NCCL (``pytest -m gpu``)."""


def start_ranks(
    module: str,
    world_size: int,
    arguments: list[str],
    log_dir: Path,
    backend: str = "gloo",
    first_on_path: Path | None = None,
):
    """Start ``python -m module arguments`` on every rank; their output goes to ``log_dir``.

    With ``gloo`` the ranks see no GPU, so they run on CPU on any machine; with ``nccl`` each takes
    one, and the test skips where there are too few. Packages in ``first_on_path`` come before the
    installed ones.
    """
    path = os.pathsep.join(map(str, filter(None, [first_on_path, REPOSITORY])))
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} GPUs needed, {torch.cuda.device_count()} here")
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
        }
        if backend == "gloo":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (log_dir / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # with the helpers Megatron starts, see end()
                )
            )
    return processes


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
        time.sleep(0.1)
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
    """Run ``module`` on ``world_size`` ranks with one JSON file as its argument."""
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / "payload.json"
    path.write_text(json.dumps(payload))
    ranks = start_ranks(module, world_size, [str(path)], log_dir, backend, first_on_path)
    wait_for(ranks, log_dir)
