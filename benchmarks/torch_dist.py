"""What our own reader of ``torch_dist`` buys over torch's: ``convert export`` as a command.

The peer is what one writes with libraries alone: torch's ``FileSystemReader`` and ``dcp.load`` into
preallocated tensors, our rules, ``safetensors.torch.save_file``, a layer a file. Both run as
commands, from start to exit, in interleaved rounds on the same checkpoint; the medians count.
``torch.load(mmap=True)`` takes no part: a ``.distcp`` file is many archives one after another,
which it cannot open. The floor is ``cp`` of the bytes, flushed. Memory is the largest resident set,
pages of mapped files included.

    python benchmarks/torch_dist.py [--seed 0] [--rounds 3] [--layers 9]
"""

import argparse
import dataclasses
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convert import ANCHOR, copy
from generated_release import generate
from harness import machine_lock, print_inputs, print_result

from megatron_k2.presets import ModelPreset

SOURCE = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def export_through_torch(checkpoint: Path, target: Path, preset: ModelPreset) -> None:
    """The peer: every weight through DCP's reader, each layer's file by safetensors."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_k2.checkpoint.names.mapping import expand
    from megatron_k2.checkpoint.names.megatron_keys import stored_key

    stored = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    layers: dict[str, list] = {}
    for pair in expand(preset):
        parts = pair.megatron.split(".layers.")
        layers.setdefault(parts[1].split(".")[0] if parts[1:] else "rest", []).append(pair)
    target.mkdir()
    for layer, pairs in layers.items():
        state = {
            key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype)
            for key in {stored_key(pair, "local") for pair in pairs}
        }
        dcp.load(state, storage_reader=FileSystemReader(str(checkpoint)), no_dist=True)
        tensors = {}
        for pair in pairs:
            whole = state[stored_key(pair, "local")]
            whole = whole if pair.expert is None else whole[pair.expert]
            for name, shape, begin in pair.parts():
                tensors[name] = whole[begin : begin + shape[0]].contiguous()
        save_file(tensors, str(target / f"{layer}.safetensors"))
        with (target / f"{layer}.safetensors").open("rb") as written:
            os.fsync(written.fileno())  # as ours does


def timed(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and MiB of the largest resident set of a process."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | SOURCE, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(folder: Path, rounds: int, seed: int, layers: int) -> dict[str, list[float]]:
    """Medians of each candidate's (wall, CPU, MiB)."""
    megatron, target = folder / "megatron", folder / "out"
    convert = [sys.executable, "-m", "megatron_k2", "convert"]
    timed([*convert, "import", str(folder / "hf"), str(megatron)])
    peer = [sys.executable, __file__, "--peer", str(megatron / "release"), str(target)]
    commands = {
        "ours": [*convert, "export", str(megatron), str(target), "--workers", "1"],
        "torch": [*peer, "--layers", str(layers)],
    }
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(commands), len(commands)):
            samples[name].append(timed(commands[name]))
            shutil.rmtree(target)
    return {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in samples.items()
    }


def main() -> None:
    """Print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="order of the candidates")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=ANCHOR.num_layers, help="0.1 GB each")
    parser.add_argument("--peer", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    preset = dataclasses.replace(ANCHOR, num_layers=options.layers)
    if options.peer:
        return export_through_torch(*options.peer, preset)
    with machine_lock(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = generate(folder / "hf", preset, is_fp8=False)
        print_inputs(gigabytes=num_bytes / 1e9, rounds=options.rounds, seed=options.seed)
        start = time.perf_counter()
        copy(folder / "hf", folder / "copy")
        floor = time.perf_counter() - start
        medians = measure(folder, options.rounds, options.seed, options.layers)
    for side, (wall, cpu, mebibytes) in medians.items():
        print(f"{side:6} {wall:6.2f} s wall {cpu:6.2f} s CPU {mebibytes:7.0f} MiB")
    print(f"cp     {floor:6.2f} s wall")
    ours, peer = medians["ours"], medians["torch"]
    print_result(
        wall_ratio=peer[0] / ours[0], cpu_ratio=peer[1] / ours[1], ours_wall=ours[0], cp_wall=floor
    )


if __name__ == "__main__":
    main()
