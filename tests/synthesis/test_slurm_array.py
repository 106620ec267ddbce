"""A job array's script, run by a stand-in for sbatch that starts each task as Slurm would.

`tests/slurm` has a real one; accounting, queues and preemption are not exercised here.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.cli.main import main
from megatron_k2.launch.array import render_array
from megatron_k2.launch.cluster import Cluster
from tests.fidelity.passages import PASSAGES
from tests.support.paths import REPOSITORY
from tests.synthesis.running import teacher

SBATCH = """\
#!/bin/bash
script="${@: -1}"
for task in $(sed -n 's/^#SBATCH --array=//p' "$script" | tr ',' ' '); do
  SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash "$script" || exit 1
done
echo 7
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of texts, ``sbatch`` on PATH, and the interpreter of this test as the nodes'."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH)
    (programs / "scontrol").write_text('#!/bin/bash\necho "$@" >> "$(dirname "$0")/requeued"\n')
    (programs / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    lines = (json.dumps({"text": " ".join(s for s, _ in p.said)}) + "\n" for p in PASSAGES)
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    return tmp_path


def words(folder, url, output, *more):
    found = ["rephrase", "run", "--input", str(folder / "texts.jsonl"), "--endpoint", url]
    return [*found, "--output", str(folder / output), *more]


def test_an_array_makes_the_same_bytes_as_this_machine(cluster, capsys):
    with teacher() as (url, _):
        assert main(words(cluster, url, "local", "--shards", "1")) == 0
        on_slurm = words(cluster, url, "array", "--engine", "slurm", "--shards", "3")
        assert main([*on_slurm, "--dry-run"]) == 0
        assert "#SBATCH --array=0,1,2" in capsys.readouterr().out
        assert main(on_slurm) == 0
        assert "job 7: 3 shards" in capsys.readouterr().out
        assert not (cluster / "array" / "kept.jsonl").exists()
        assert main(on_slurm) == 0
    for name in ("kept.jsonl", "rejected.jsonl"):
        assert (cluster / "array" / name).read_bytes() == (cluster / "local" / name).read_bytes()


def test_a_task_near_its_limit_stops_and_queues_itself_again(cluster, capsys):
    with teacher(delay=0.3) as (url, counts):
        on_slurm = words(cluster, url, "run", "--engine", "slurm", "--shards", "1")
        on_slurm += ["--concurrency", "1"]
        assert main([*on_slurm, "--dry-run"]) == 0
        script = cluster / "script"
        script.write_text(capsys.readouterr().out)
        environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        process = subprocess.Popen(["bash", str(script)], env=environment)
        while counts().get("answered", 0) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0
        assert (cluster / "bin" / "requeued").read_text() == "requeue 7_0\n"
        assert counts()["repeated"] == 0


def test_what_a_site_says_is_quoted():
    odd = Cluster(
        account="a b;c",
        environment=(("NAME", "$(touch x) 'y'"),),
        container="image one",
        mounts=("/a b:/c",),
        python="python 3",
    )
    script = render_array("name; x", Path("/tmp/o p"), ["-m", "x y"], ["--f", "$g"], [3, 5], odd)
    assert "#SBATCH --array=3,5\n" in script
    assert "export NAME='$(touch x) '\"'\"'y'\"'\"''" in script
    assert "srun '--container-image=image one' '--container-mounts=/a b:/c' 'python 3'" in script
    assert re.search(r"'x y' \"\$SLURM_ARRAY_TASK_ID\" --f '\$g' &", script)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
