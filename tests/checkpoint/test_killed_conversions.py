"""The commands killed at random moments and run again, until they finish: the same bytes.

Fixed moments (after a file, between the last file and the end) are in ``test_import`` and
``test_export``. Not exercised: a power cut, which loses what a kill does not.
"""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory

SEED = 20260722
NUM_KILLS = 5
PRESET = dataclasses.replace(TINY, num_layers=24)
"""As many files to be killed among."""


class Command:
    """``megatron-k2 convert`` with its target; watched from when it begins to write."""

    def __init__(self, *arguments):
        self.target = Path(arguments[2])
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        self._command = [sys.executable, "-m", "megatron_k2.cli.main", "convert"]
        self._command += [*map(str, arguments), "--workers", "2"]

    def run(self, kill_after=None):
        """Seconds from the first byte to the end, or None if it was killed."""
        repo = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            self._command, env=os.environ | {"PYTHONPATH": repo}, stdout=subprocess.DEVNULL
        )
        was_there = self.partial.exists()
        receipts = self.partial.with_name(f"{self.partial.name}.receipts") / "job"
        before = receipts.stat().st_mtime_ns if was_there and receipts.exists() else 0
        while process.poll() is None and not (
            receipts.exists() and receipts.stat().st_mtime_ns != before
        ):
            time.sleep(0.001)
        started = time.monotonic()
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None
        assert code == 0
        return time.monotonic() - started


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_command_killed_at_random_moments_ends_in_the_same_bytes(tmp_path, verb):
    source = write_directory(tmp_path / "hf", PRESET, as_fp8(random_weights(PRESET)))
    command = Command("import", source, tmp_path / "megatron")
    seconds = command.run()
    if verb == "export":
        command = Command("export", tmp_path / "megatron", tmp_path / "out", "--dtype", "fp8")
        seconds = command.run()
    expected = contents(command.target)
    shutil.rmtree(command.target)
    before = {path.name for path in tmp_path.iterdir()}
    moments = random.Random(SEED)
    print(f"seed {SEED}, {seconds:.2f} s without a kill")
    num_killed, kept = 0, {}
    while num_killed < NUM_KILLS and not command.target.exists():
        if command.run(kill_after=moments.uniform(0, seconds * 0.6)) is None:
            num_killed += 1
            finished = {p.name: p.stat().st_ino for p in command.partial.rglob("*.distcp")}
            finished |= {p.name: p.stat().st_ino for p in command.partial.glob("*.safetensors")}
            assert kept.items() <= finished.items()  # none was written again
            receipts = command.partial.with_name(f"{command.partial.name}.receipts")
            kept = {n: i for n, i in finished.items() if (receipts / f"{n}.json").exists()}
            print(f"killed with {len(kept)} files finished")
    if not command.target.exists():
        command.run()
    assert num_killed
    assert contents(command.target) == expected
    assert {path.name for path in tmp_path.iterdir()} - before == {command.target.name}
