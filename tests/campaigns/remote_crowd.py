"""20,000 requests against a server that fails: is each answered, once, and at what cost?

    python tests/campaigns/remote_crowd.py --seed 0

The server is a fake in a process of its own (``tests/engine/remote/faulty_server.py``): 8 % errors,
4 % 429 with ``Retry-After``, 3 % answers cut in the middle, 1 % that take a second. Prints requests
a second of this process's CPU. Not exercised: TLS, a network, long answers.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_k2.engine.protocol import EngineError
from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.endpoints import Endpoint, Policy
from tests.engine.remote.faulty_server import SHARES, answer_of
from tests.support.paths import REPOSITORY


@contextlib.contextmanager
def faulty_server(shares=SHARES):
    """Its address."""
    command = [sys.executable, "-m", "tests.engine.remote.faulty_server", json.dumps(shares)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def crowd(urls, num_requests, policy, seed):
    """Whether each request was right, wrong or failed; CPU and wall seconds."""
    counts = Counter()
    endpoints = [Endpoint(url) for url in urls]
    async with Client(endpoints, policy, seed) as client:

        async def ask(number):
            body = {"id": f"{seed}-{number}", "model": "m", "prompt": "x" * 200, "max_tokens": 8}
            try:
                answer = await client.post("/v1/completions", body)
            except EngineError:
                counts["failed"] += 1
                return
            text = answer["choices"][0]["text"]
            counts["right" if text == answer_of(body) else "wrong"] += 1

        cpu, wall = time.process_time(), time.perf_counter()
        await asyncio.gather(*(ask(number) for number in range(num_requests)))
        return counts, time.process_time() - cpu, time.perf_counter() - wall


def main(argv=None):
    """Run it; exit code 1 if a request was not answered rightly, once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of the requests' names and the waits")
    options = parser.parse_args(argv)
    policy = Policy(concurrency=options.concurrency, backoff_seconds=0.05)
    with faulty_server() as url:
        counts, cpu, wall = asyncio.run(crowd([url], options.requests, policy, options.seed))
        served = json.load(urllib.request.urlopen(f"{url}/counts"))
    print(f"answers: {dict(counts)}; the server: {served}")
    print(
        f"RESULT requests={options.requests} cpu_s={cpu:.2f} wall_s={wall:.2f} "
        f"per_cpu_s={options.requests / cpu:.0f}"
    )
    return int(counts != {"right": options.requests})


if __name__ == "__main__":
    sys.exit(main())
