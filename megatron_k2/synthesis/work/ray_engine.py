"""The engine of a Ray cluster: a core task a shard, with retries.

Not actors, which by default lose what they had when a worker is killed, and not Ray Data, which
needs processors for reading that a small cluster has not got. A task starts the shard's worker as
a process of its own, as the other engines do: what it did is kept, whoever is killed.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.synthesis.work.job import Job
from megatron_k2.synthesis.work.local import worker_command
from megatron_k2.synthesis.work.worker import STOPPED

RETRIES = 3
_STORE_BYTES = 100 << 20
"""Of Ray's object store, which holds nothing of ours; its default is a third of the memory."""
_HELD_SECONDS = 60.0
"""For a killed task's worker to stop and let go of its shard."""


def run_on_ray(folder: Path, job: Job, concurrency: int) -> bool:
    """Work until every shard has ended; whether all of them ended by themselves.

    The cluster is the one that ``RAY_ADDRESS`` names, or one that is started here.

    Args:
        folder: of the job, on a file system that all nodes share.
        job: its record.
        concurrency: requests under way at one time, over all tasks.

    Raises:
        UserError: Ray is not installed or does not start, or a worker's own sentence.
    """
    ray = _ray()
    with _cluster(ray):
        found = _results(ray, folder, job, concurrency)
    for shard, (code, said) in enumerate(found):
        if code not in (0, STOPPED):
            raise UserError(said if code == 2 else f"shard {shard} ended with {code}: {said}")
    return all(code == 0 for code, _ in found)


def _results(ray: Any, folder: Path, job: Job, concurrency: int) -> list[tuple[int, str]]:
    """Each shard's exit code and what it said."""
    try:
        cores = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        each = max(concurrency // min(cores, job.num_shards), 1)
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(work_one)
        refs = [task.remote(str(folder), shard, each) for shard in range(job.num_shards)]
        found: list[tuple[int, str]] = ray.get(refs)
        return found
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray: {str(error)[:300]}; what was done is kept, run again") from None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("ray is not installed; pip install 'megatron-k2[ray]'") from None
    return ray


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Connected to one, or one that is started here and ended."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        here: dict[str, Any] = {}
        if "RAY_ADDRESS" not in os.environ:  # paths of its sockets must stay under 108 bytes
            here = {"_temp_dir": short, "object_store_memory": _STORE_BYTES}
            here["include_dashboard"] = False
        try:
            ray.init(log_to_driver=False, logging_level="error", **here)
        except Exception as error:  # it raises whatever its helpers ran into
            raise UserError(f"Ray does not start: {str(error)[:300]}; try --engine local") from None
        try:
            yield
        finally:
            ray.shutdown()


def work_one(folder: str, shard: int, concurrency: int) -> tuple[int, str]:
    """One shard, in a process; its exit code and what it said."""
    words, flags = worker_command(Path(folder), concurrency)
    until = time.monotonic() + _HELD_SECONDS
    while True:
        with subprocess.Popen(
            [sys.executable, *words, str(shard), *flags, "--watch-stdin"],
            stdin=subprocess.PIPE,  # it ends with this task
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            said = process.stderr.read().strip()
            code = process.wait()
        is_held = code == 2 and "in use by another process" in said
        if not is_held or time.monotonic() > until:
            return code, said
        time.sleep(1.0)
