"""Items per CPU second of the synthesis engine, cold and warm, beside peers on the same endpoint.

Cold: every item is one request to a scripted endpoint in a process of its own, with faults. Warm:
the same items again with every answer in the store and no item ended. CPU is of this process and of
the worker it starts, its start and imports among it; the endpoint's is not. The bare client of the
same requests is the ceiling. datatrove's inference runner and NeMo Data Designer stand beside
it where an interpreter that has them is named; they are given an endpoint without faults, since one
answer of 500 ends the first.

    python benchmarks/synthesis.py [--number 20000] [--concurrency 64] [--peer-python PYTHON]
        [--data-designer-python PYTHON]
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness import machine_lock, print_inputs, print_result

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
FAULTS = {"echo": True, "errors": 0.05, "busy": 0.02, "drop": 0.01}
LEAST_COLD, LEAST_WARM = 800, 5000
TASK = "tests.synthesis.echo_task:EchoTask"


@contextlib.contextmanager
def endpoint(options: dict[str, object]) -> Iterator[str]:
    """A scripted one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.synthesis.teacher", json.dumps(options)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def engine(folder: Path, url: str, number: int, concurrency: int) -> tuple[float, float, float]:
    """Items a CPU second cold and warm, and wall seconds cold."""
    from megatron_k2.synthesis.work.job import STORE_FILE, Job, begin, distribute, shard_folder
    from megatron_k2.synthesis.work.local import run_local
    from megatron_k2.synthesis.work.merge import merge

    job = Job(TASK, {"number": number}, 1, {"endpoint": url})
    rates = []
    walls = []
    for _ in ("cold", "warm"):
        cpu, wall = cpu_seconds(), time.perf_counter()
        begin(folder, job)
        distribute(folder, job, job.made_task())
        assert run_local(folder, job, concurrency)
        merge(folder, job)
        rates.append(number / (cpu_seconds() - cpu))
        walls.append(time.perf_counter() - wall)
        with contextlib.closing(
            sqlite3.connect(shard_folder(folder, 0) / STORE_FILE, isolation_level=None)
        ) as store:
            (ended,) = store.execute("select count(*) from ended").fetchone()
            assert ended == number
            store.execute("delete from ended")
    return rates[0], rates[1], walls[0]


async def bare(url: str, number: int, concurrency: int) -> None:
    """The same requests by aiohttp alone, without retries: what fails is not asked again."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector) as session:
        numbers = iter(range(number))

        async def lane() -> None:
            for each in numbers:
                message = {"role": "user", "content": f"the text of item {each}"}
                body = {"model": "m", "messages": [message], "max_tokens": 16, "temperature": 0}
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                        await answer.read()

        await asyncio.gather(*(lane() for _ in range(concurrency)))


def peer(python: str, name: str, options: argparse.Namespace) -> float:
    """Another's items a CPU second, by a script of this folder."""
    script = Path(__file__).with_name(name)
    with endpoint({"echo": True}) as url, tempfile.TemporaryDirectory() as folder:
        words = [url, str(options.number // 10), str(options.concurrency), folder]
        done = subprocess.run(
            [python, str(script), *words],
            env=os.environ | {"NEMO_TELEMETRY_ENABLED": "false", "HOME": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return float(done.stdout.splitlines()[-1])


def peers(python: str | None, name: str, options: argparse.Namespace) -> float | str:
    """The median of the rounds, or why there is none."""
    if not python:
        return "not run: no interpreter that has it was named"
    found = sorted(peer(python, name, options) for _ in range(options.rounds))
    return found[options.rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=20_000, help="items")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", metavar="PYTHON", help="an interpreter with datatrove")
    parser.add_argument(
        "--data-designer-python", metavar="PYTHON", help="an interpreter with data-designer"
    )
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with machine_lock():
        print_inputs(**vars(options))
        colds, warms, walls, bares = [], [], [], []
        for _ in range(options.rounds):
            with endpoint(FAULTS) as url:
                cpu = cpu_seconds()
                asyncio.run(bare(url, options.number, options.concurrency))
                bares.append(options.number / (cpu_seconds() - cpu))
            folder = Path(tempfile.mkdtemp(prefix="synthesis-"))
            try:
                with endpoint(FAULTS) as url:
                    cold, warm, wall = engine(folder, url, options.number, options.concurrency)
            finally:
                shutil.rmtree(folder)
            colds.append(cold)
            warms.append(warm)
            walls.append(wall)
        middle = options.rounds // 2
        cold, warm = sorted(colds)[middle], sorted(warms)[middle]
        designer = options.data_designer_python
        print_result(
            cold_per_cpu_s=cold,
            warm_per_cpu_s=warm,
            bare_client_per_cpu_s=sorted(bares)[middle],
            datatrove_per_cpu_s=peers(options.peer_python, "synthesis_peer.py", options),
            data_designer_per_cpu_s=peers(designer, "synthesis_data_designer.py", options),
            cold_wall_s=sorted(walls)[middle],
            least_cold=LEAST_COLD,
            least_warm=LEAST_WARM,
            ok=cold >= LEAST_COLD and warm >= LEAST_WARM,
        )


if __name__ == "__main__":
    main()
