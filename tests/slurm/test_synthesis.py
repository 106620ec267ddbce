"""A rephrasing as a job array on a real Slurm, one task queued again under way: the same bytes."""

import json
import subprocess
import sys
import time

import pytest

from megatron_k2.cli.main import main
from megatron_k2.launch.jobs import jobs_of
from tests.fidelity.passages import PASSAGES
from tests.slurm.cluster import LOW, missing, private_cluster
from tests.support.paths import REPOSITORY
from tests.synthesis.running import teacher

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    with private_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def queued(job):
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def test_an_array_with_a_task_queued_again_makes_the_same_bytes(tmp_path):
    texts = tmp_path / "texts.jsonl"
    lines = (json.dumps({"text": " ".join(s for s, _ in p.said)}) + "\n" for p in PASSAGES)
    texts.write_text("".join(lines))
    profile = tmp_path / "site.yaml"
    profile.write_text(
        f"partition: {LOW}\ntime: '00:10:00'\nseconds_to_save: 60\npython: {sys.executable}\n"
        f"environment: {{PYTHONPATH: '{REPOSITORY}'}}\n"
    )

    def words(url, output, *more):
        found = ["rephrase", "run", "--input", str(texts), "--endpoint", url]
        return [*found, "--output", str(tmp_path / output), *more]

    with teacher() as (url, _):
        assert main(words(url, "local", "--shards", "1")) == 0
    with teacher(delay=0.3) as (url, counts):
        on_slurm = words(url, "array", "--engine", "slurm", "--shards", "2", "--profile")
        on_slurm += [str(profile), "--concurrency", "8"]
        assert main(on_slurm) == 0
        (job,) = (each.number for each in jobs_of(str(tmp_path / "array")))
        deadline = time.monotonic() + 180
        while counts().get("answered", 0) < 40:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
        while queued(job):
            assert time.monotonic() < deadline + 300
            time.sleep(0.5)
        assert main(on_slurm) == 0
        assert counts()["repeated"] <= 8 + 64
    for name in ("kept.jsonl", "rejected.jsonl"):
        array, local = (tmp_path / each / name for each in ("array", "local"))
        assert array.read_bytes() == local.read_bytes()
