"""Two layers of Kimi K2's own width there and back: what a conversion of the whole would take.

Generates block FP8 at hidden size 7168 with the real vocabulary (embedding and head of 163,840
rows): one dense layer and one with ``--experts`` experts; then runs the commands ``convert import``
and ``convert export --dtype fp8`` and watches the anonymous memory of all their processes. ``cp``
of the source says what the disk does. With 16 experts: 6.1 GB of source, 20 GB of disk in all.

    python benchmarks/convert_slice.py [--experts 16] [--workers 2]
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from generated_release import SHARD, generate
from harness import machine_lock, print_inputs, print_result

from megatron_k2.presets import KIMI_K2

LIMIT_BYTES = 2 * 2**30
"""Of anonymous memory, all processes together."""

NEEDED_BYTES = 25 * 10**9


def anonymous_bytes(root: int) -> list[tuple[int, int]]:
    """Of a process and of all that descend from it: RssAnon, and its share of it (Pss_Anon).

    Forked workers share their parent's imports, which every RssAnon counts anew.
    """
    found = []
    pending = [root]
    while pending:
        proc = Path("/proc") / str(pending.pop())
        try:
            own, share = _kib(proc / "status", "RssAnon"), _kib(proc / "smaps_rollup", "Pss_Anon")
            pending += map(int, (proc / "task" / proc.name / "children").read_text().split())
        except OSError:
            continue  # it has just ended
        found.append((own * 1024, share * 1024))
    return found


def _kib(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def watched(command: list[str]) -> tuple[float, int, int]:
    """Run, output passing through; seconds, peak of one process (RssAnon), of all (Pss_Anon)."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen(command, env=environment)
    largest = together = 0
    while process.poll() is None:
        now = anonymous_bytes(process.pid)
        largest = max([largest, *(own for own, _ in now)])
        together = max(together, sum(share for _, share in now))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - started, largest, together


def copied(folder: Path) -> float:
    """Seconds that ``cp`` takes for the source, with the flush a conversion does."""
    started = time.perf_counter()
    subprocess.run(["cp", folder / "hf" / SHARD, folder / "copy"], check=True)
    subprocess.run(["sync", folder / "copy"], check=True)
    seconds = time.perf_counter() - started
    (folder / "copy").unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    preset = dataclasses.replace(KIMI_K2, num_layers=2, num_moe_experts=arguments.experts)
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < NEEDED_BYTES:
        raise SystemExit(print(f"not run: {free / 1e9:.0f} GB of disk free, 25 wanted"))
    with machine_lock(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print_inputs(**vars(arguments))
        num_bytes = generate(folder / "hf", preset, is_fp8=True)
        cp_seconds = copied(folder)
        print(f"source: {num_bytes / 1e9:.2f} GB; cp, flushed: {cp_seconds:.1f} s", flush=True)
        convert = [sys.executable, "-m", "megatron_k2", "convert"]
        same = ["--workers", str(arguments.workers), "--project", "kimi-k2"]
        there = [*convert, "import", str(folder / "hf"), str(folder / "megatron"), *same]
        back = [*convert, "export", str(folder / "megatron"), str(folder / "back"), *same]
        figures: dict[str, object] = {
            "source_gigabytes": num_bytes / 1e9,
            "cp_seconds": cp_seconds,
        }
        for verb, command in {"import": there, "export": [*back, "--dtype", "fp8"]}.items():
            seconds, largest, together = watched(command)
            figures[f"{verb}_seconds"] = seconds
            figures[f"{verb}_peak_mib_a_process"] = largest >> 20
            figures[f"{verb}_peak_mib"] = together >> 20
            assert together < LIMIT_BYTES, f"{verb} took {together >> 20} MiB"
        same_bytes = sum(path.stat().st_size for path in (folder / "back").glob("*.safetensors"))
        assert same_bytes > (folder / "hf" / SHARD).stat().st_size - (1 << 20)
        print_result(**figures)


if __name__ == "__main__":
    main()
