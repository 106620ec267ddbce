"""``megatron-k2 doctor``: what this machine has, and which features that turns on or off."""

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def shown(machine: "Machine") -> str:
    """Facts, features and problems for a terminal."""
    from megatron_k2.doctor import features, problems

    facts, abilities, faults = _facts(machine), features(machine), problems(machine)
    width = max(len(name) for name, _ in facts)
    lines = ["This machine"]
    lines += [f"  {name:<{width}}  {text}" for name, text in facts]
    lines += ["", "Features"]
    width = max(len(feature.name) for feature in abilities)
    for feature in abilities:
        lines.append(
            f"  {'on ' if feature.is_on else 'off'}  {feature.name:<{width}}  {feature.note}"
        )
    lines += ["", "Problems" if faults else "Nothing required is missing."]
    lines += [f"  {fault}" for fault in faults]
    return "\n".join(lines)


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

    machine = look()
    print(json.dumps(as_dict(machine), indent=2) if arguments.json else shown(machine))
    return 1 if problems(machine) else 0
