"""A scripted teacher beside a test, and jobs."""

import contextlib
import json
import subprocess
import sys
import urllib.request

from megatron_k2.synthesis.work.job import Job, begin, distribute
from megatron_k2.synthesis.work.local import run_local
from megatron_k2.synthesis.work.merge import KEPT_FILE, REJECTED_FILE, merge
from tests.support.paths import REPOSITORY
from tests.synthesis.echo_task import NAME


@contextlib.contextmanager
def teacher(**options):
    """The address of one, and what tells its counts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.synthesis.teacher", json.dumps(options)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"

        def counts():
            with urllib.request.urlopen(f"{url}/counts") as answer:
                return json.load(answer)

        yield url, counts
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def begun(folder, url, number, num_shards=1, **options):
    job = Job(NAME, {"number": number}, num_shards, {"endpoint": url, **options})
    begin(folder, job)
    distribute(folder, job, job.made_task())
    return job


def merged(folder, job):
    merge(folder, job)
    return (folder / KEPT_FILE).read_bytes() + b"--\n" + (folder / REJECTED_FILE).read_bytes()


def run(folder, url, number, num_shards=1, concurrency=32, **options):
    job = begun(folder, url, number, num_shards, **options)
    assert run_local(folder, job, concurrency)
    return merged(folder, job)
