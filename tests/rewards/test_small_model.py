"""A real model as critic, too small to be one: ``make test-critic``, which builds its environment.

It goes by the order of the answers and obeys what they say. The calibration must find that out by
itself, and refuse it. Not exercised: a model good enough to be trusted.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_k2.cli.main import main
from megatron_k2.rewards.pairs import made_pairs, to_line
from tests.support.distributed import free_port

CRITIC_PYTHON = os.environ.get("CRITIC_PYTHON")
if not CRITIC_PYTHON:
    pytest.skip("make test-critic builds a small model's environment", allow_module_level=True)

pytestmark = pytest.mark.slow
SERVER = Path(__file__).with_name("small_model.py")


@pytest.fixture(scope="module")
def url():
    command = [CRITIC_PYTHON, str(SERVER), str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        yield next(line.strip() for line in lines if line.startswith("http://"))
    finally:
        process.kill()
        process.wait()


def test_a_model_that_cannot_judge_is_found_out_and_refused(url, tmp_path, capsys):
    pairs, report = tmp_path / "pairs.jsonl", tmp_path / "critic.json"
    pairs.write_text("".join(map(to_line, made_pairs(0, 6))))
    command = ["critic", "calibrate", "--endpoint", url, "--pairs", str(pairs)]
    assert main([*command, "--output", str(report), "--concurrency", "4"]) == 1
    said = capsys.readouterr()
    assert "it goes by the order" in said.out + said.err
    assert "below its bar" in said.out + said.err
    assert json.loads(report.read_text())
