"""Step: what ``doctor`` says of the machine, and what goes into the record of it."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from megatron_k2.doctor import features, look, problems
from megatron_k2.planning.measured_rates import Device
from megatron_k2.selfcheck.findings import Figure, Findings


def measure(device: str, workload: str) -> Findings:
    """Everything that keeps training from running is a failure."""
    del device, workload
    machine = look()
    found = problems(machine)
    if found:
        return Findings("FAIL", "; ".join(found))
    on = [feature.name for feature in features(machine) if feature.is_on]
    off = [feature.name for feature in features(machine) if not feature.is_on]
    note = f"on: {', '.join(on)}; off: {', '.join(off) or 'nothing'}"
    return Findings("pass", note, (Figure("cores", machine.num_cores),))


def device_of(kind: str) -> Device:
    """The device that is measured."""
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Device(
            torch.cuda.get_device_name(0),
            "cuda",
            properties.total_memory,
            torch.cuda.device_count(),
            {"driver": _driver(), "capability": f"{properties.major}.{properties.minor}"},
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(_cpu_name(), "cpu", memory, len(os.sched_getaffinity(0)))


def versions() -> dict[str, Any]:
    """Of what the figures depend on."""
    machine = look()
    known = {name: version for name, version in machine.versions.items() if version}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        **known,
    }


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.split()[0]


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
