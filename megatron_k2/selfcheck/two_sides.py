"""The same computation on the device and on the CPU, in two processes at once.

A process is either on a GPU or on the CPU host (``host.cpu`` looks for a device once), so that a
comparison of the two takes two processes. On a machine without a GPU both sides are the CPU's, the
second on one thread more: sums run in another order.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def both_sides(
    module: str, device: str, workload: str, arguments: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a module's ``side(workload, *arguments)`` returns on the device, and on the CPU.

    Args:
        module: of this package.
        device: ``cuda`` or ``cpu``.
        workload: see ``steps.Step``.
        arguments: further ones, strings.

    Raises:
        RuntimeError: with the end of what a side printed, if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "device": {"OMP_NUM_THREADS": "2"},
            "reference": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        }
        if device == "cpu":
            sides["device"]["CUDA_VISIBLE_DEVICES"] = ""
        started = {}
        for name, environment in sides.items():
            out = Path(folder) / name
            command = [sys.executable, "-m", __name__, module, str(out), workload, *arguments]
            with out.with_suffix(".log").open("w") as log:
                started[name] = subprocess.Popen(
                    command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
                )
        codes = {name: process.wait() for name, process in started.items()}
        for name, code in codes.items():
            if code:
                said = (Path(folder) / f"{name}.log").read_text().strip().splitlines()
                raise RuntimeError(f"the {name}'s side ended with {code}: {' | '.join(said[-4:])}")
        found = [torch.load(Path(folder) / name, map_location="cpu") for name in sides]
    return found[0], found[1]


def main(argv: list[str]) -> None:
    """One side."""
    module, out, *arguments = argv
    side: Callable[..., dict[str, Any]] = importlib.import_module(module).side
    torch.save(side(*arguments), out)


if __name__ == "__main__":
    main(sys.argv[1:])
