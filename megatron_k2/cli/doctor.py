"""``megatron-k2 doctor``: what this machine has, and which features that turns on or off."""

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from megatron_k2.doctor import Machine


def _facts(machine: "Machine") -> list[tuple[str, str]]:
    from megatron_k2.host.repairs import CHECKED_MEGATRON_VERSIONS

    torch = machine.torch
    rows = [
        ("Python", f"{'.'.join(map(str, machine.python))} on {machine.system}"),
        ("cores", str(machine.num_cores)),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("free disk here", f"{machine.free_disk_bytes / 2**30:.1f} GiB"),
        ("C compiler", machine.c_compiler or "none"),
    ]
    if torch is None:
        rows.append(("torch", "not installed"))
    else:
        build = f"CUDA {torch.cuda_build} build" if torch.cuda_build else "CPU build"
        rows += [
            ("torch", f"{torch.version}, {build}"),
            ("CUDA devices", ", ".join(torch.devices) or "none"),
            ("NCCL", "yes" if torch.has_nccl else "no"),
            ("gloo", "yes" if torch.has_gloo else "no"),
        ]
    for name, version in machine.versions.items():
        shown = version or "not installed"
        if name == "megatron-core" and version is not None:
            is_checked = version in CHECKED_MEGATRON_VERSIONS
            shown += " (checked)" if is_checked else " (NOT checked)"
        rows.append((name, shown))
    return rows


def shown(machine: "Machine") -> "list[RenderableType]":
    """Facts, features and problems for a terminal."""
    from megatron_k2.doctor import features, problems
    from megatron_k2.terminal import pairs

    faults = problems(machine)
    return [
        "This machine",
        pairs(_facts(machine)),
        "\nFeatures",
        pairs(("on" if f.is_on else "off", f.name, f.note) for f in features(machine)),
        "\nProblems" if faults else "\nNothing required is missing.",
        *(f"  {fault}" for fault in faults),
    ]


def main(argv: list[str]) -> int:
    """Print the report; 0 unless something required is missing or unchecked, then 1."""
    parser = argparse.ArgumentParser(
        prog="megatron-k2 doctor",
        description="What this machine has and which features that turns on or off. Imports torch "
        "and nothing else; other packages are looked up by their metadata. Exit code 1 if "
        "something required is missing, or Megatron-Core is of a version that was not checked.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    arguments = parser.parse_args(argv)

    from megatron_k2.doctor import as_dict, look, problems
    from megatron_k2.terminal import show

    machine = look()
    if arguments.json:
        print(json.dumps(as_dict(machine), indent=2))
    else:
        show(*shown(machine))
    return 1 if problems(machine) else 0
