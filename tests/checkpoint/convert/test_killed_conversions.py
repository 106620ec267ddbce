"""The commands killed at random moments and run again, until they finish: the same bytes.

Fixed moments (after a file, between the last file and the end) are in ``test_import_hf`` and
``test_export_hf``. Not exercised: a power cut, which loses what a kill does not.
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
from tests.support.paths import REPOSITORY

SEED = 20260722
NUM_KILLS = 5
PRESET = dataclasses.replace(TINY, num_layers=24)
"""As many files to be killed among."""


class Command:
    """``megatron-k2 convert`` with its target; watched from when it begins to write."""

    def __init__(self, *arguments):
        self.target = Path(arguments[2])
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        self.receipts = self.partial.with_name(f"{self.partial.name}.receipts")
        self._command = [sys.executable, "-m", "megatron_k2", "convert"]
        self._command += [*map(str, arguments), "--workers", "2"]

    def run(self, kill_after=None):
        """Seconds from the first byte to the end, or None if it was killed."""
        repo = str(REPOSITORY)
        job = self.receipts / "job"  # written anew as a run begins
        before = inode(job)
        process = subprocess.Popen(
            self._command, env=os.environ | {"PYTHONPATH": repo}, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and inode(job) in (before, None):
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


def inode(path):
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def inodes(directory):
    """Of the files that have their final name; one written again has another."""
    files = (*directory.rglob("*.distcp"), *directory.glob("*.safetensors"))
    return {path.name: path.stat().st_ino for path in files}


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
    while not command.target.exists():
        again = num_killed < NUM_KILLS
        num_killed += command.run(moments.uniform(0, 0.6 * seconds) if again else None) is None
        written = inodes(command.target if command.target.exists() else command.partial)
        assert kept.items() <= written.items()  # what was finished was not written again
        kept = {
            name: i for name, i in written.items() if (command.receipts / f"{name}.json").exists()
        }
        print(f"{num_killed} kills, {len(kept)} files finished")
    assert num_killed
    assert contents(command.target) == expected
    # a kill between the rename, which makes the result whole, and the last line leaves receipts
    left = {path.name for path in tmp_path.iterdir()} - before
    assert left <= {command.target.name, command.receipts.name}
