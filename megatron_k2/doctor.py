"""What this machine has, and which features of megatron_k2 that turns on or off.

Packages are looked up by their metadata and not imported; the one exception is torch, which alone
knows its CUDA build, devices and communication backends. ``look`` gathers facts, everything else
is a pure function of them.
"""

import dataclasses
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.host.repairs import (
    CHECKED_MEGATRON_VERSIONS,
    MINIMUM_TE_TEXT,
    has_sound_transformer_engine,
    installed_version,
    release,
    resiliency_extension_fault,
)

MINIMUM_PYTHON = (3, 12)
MINIMUM_TORCH = (2, 9)

DISTRIBUTIONS = {
    "megatron-core": "megatron-core",
    "emerging-optimizers": "emerging-optimizers",
    "Transformer Engine": "transformer-engine",
    "apex": "apex",
    "triton": "triton",
    "NeMo-Run": "nemo-run",
    "leptonai": "leptonai",
    "Megatron-Bridge": "megatron-bridge",
    "nvidia-resiliency-ext": "nvidia-resiliency-ext",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "tiktoken": "tiktoken",
    "pyarrow": "pyarrow",
    "fastapi": "fastapi",
}
"""Name shown -> distribution asked for; torch is looked at by itself."""

MODULES_WITHOUT_METADATA = {"apex": "apex"}
"""Distributions that a source build may leave without metadata -> their module."""


@dataclass(frozen=True)
class TorchFacts:
    """What torch says of itself and of the devices it sees."""

    version: str
    cuda_build: str | None
    """CUDA version torch was built for; ``None`` for a CPU build."""
    devices: tuple[str, ...]
    """Names of the visible CUDA devices."""
    has_nccl: bool
    has_gloo: bool

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version as two numbers: 2.11 comes after 2.9."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


@dataclass(frozen=True)
class Machine:
    """Facts about one machine and one Python environment."""

    python: tuple[int, int, int]
    system: str
    num_cores: int
    """Cores this process may use."""
    memory_bytes: int
    free_disk_bytes: int
    """Where the command was started."""
    c_compiler: str | None
    torch: TorchFacts | None
    versions: dict[str, str | None]
    """A key of ``DISTRIBUTIONS`` -> version, ``None`` if absent."""

    def has(self, name: str) -> bool:
        """Whether the distribution shown as ``name`` is installed."""
        return self.versions[name] is not None

    @property
    def has_cuda(self) -> bool:
        """Whether torch sees a CUDA device."""
        return self.torch is not None and bool(self.torch.devices)


@dataclass(frozen=True)
class Feature:
    """Something megatron_k2 can do here, or cannot."""

    name: str
    is_on: bool
    note: str
    """The package or device it rests on; for a feature that is off, how to get it."""


def look(directory: Path | None = None) -> Machine:
    """The facts of this machine; imports torch and nothing else of weight."""
    return Machine(
        python=sys.version_info[:3],
        system=f"{platform.system()} {platform.machine()}",
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_disk_bytes=shutil.disk_usage(directory or Path.cwd()).free,
        c_compiler=next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        torch=look_at_torch(),
        versions={name: _version(name) for name in DISTRIBUTIONS},
    )


def _version(name: str) -> str | None:
    version = installed_version(DISTRIBUTIONS[name])
    module = MODULES_WITHOUT_METADATA.get(name)
    if version is None and module is not None and importlib.util.find_spec(module) is not None:
        return "present, version unknown"
    return version


def look_at_torch() -> TorchFacts | None:
    """Torch's own facts; ``None`` where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    import torch.distributed as dist

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return TorchFacts(
        version=torch.__version__,
        cuda_build=torch.version.cuda,
        devices=tuple(torch.cuda.get_device_name(i) for i in range(count)),
        has_nccl=dist.is_available() and dist.is_nccl_available(),
        has_gloo=dist.is_available() and dist.is_gloo_available(),
    )


def problems(machine: Machine) -> list[str]:
    """What keeps training from running at all, each with the way out. Empty: nothing."""
    found = []
    if machine.python[:2] < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        found.append(f"Python {'.'.join(map(str, machine.python))}; {wanted} or newer is needed")
    if machine.torch is None:
        found.append("torch is not installed; pip install 'torch>=2.9,<3'")
    elif machine.torch.release < MINIMUM_TORCH:
        found.append(f"torch {machine.torch.version} is too old; pip install 'torch>=2.9,<3'")
    elif not (machine.torch.has_gloo or (machine.has_cuda and machine.torch.has_nccl)):
        found.append("this torch has neither gloo nor NCCL with a device; install a released build")
    megatron = machine.versions["megatron-core"]
    checked = CHECKED_MEGATRON_VERSIONS[-1]
    if megatron is None:
        found.append(f"megatron-core is not installed; pip install megatron-core=={checked}")
    elif megatron not in CHECKED_MEGATRON_VERSIONS:
        found.append(
            f"megatron-core {megatron} was not checked (checked: "
            f"{', '.join(CHECKED_MEGATRON_VERSIONS)}); pip install megatron-core=={checked}"
        )
    if fault := resiliency_extension_fault(machine.versions["nvidia-resiliency-ext"]):
        found.append(fault)
    if not machine.has("emerging-optimizers"):
        found.append(
            "emerging-optimizers is not installed, and Megatron's optimizer registry opens only "
            "with it; pip install 'emerging-optimizers>=0.3,<0.4'"
        )
    return found


def _feature(name: str, is_on: bool, rests_on: str, way: str) -> Feature:
    return Feature(name, is_on, rests_on if is_on else way)


NEEDS_GPU = "needs an NVIDIA GPU and a CUDA build of torch"


def features(machine: Machine) -> list[Feature]:
    """What this machine turns on and off."""
    return [*_training(machine), *_kernels(machine), *_companions(machine)]


def _training(machine: Machine) -> list[Feature]:
    torch, cuda = machine.torch, machine.has_cuda
    is_sound = not problems(machine)
    return [
        _feature(
            "training on CPU",
            is_sound and not cuda and torch is not None and torch.has_gloo,
            "gloo, through megatron_k2.host.cpu",
            "used only where there is no CUDA device" if cuda else "see the problems below",
        ),
        _feature(
            "training on GPUs",
            is_sound and cuda and torch is not None and torch.has_nccl,
            f"NCCL, {len(torch.devices) if torch else 0} device(s)",
            "see the problems below" if cuda else NEEDS_GPU,
        ),
    ]


def _kernels(machine: Machine) -> list[Feature]:
    """What makes it faster or smaller, most of it on GPUs only."""
    cuda, has = machine.has_cuda, machine.has
    te_version = machine.versions["Transformer Engine"]
    return [
        _feature(
            "fused AdamW",
            cuda and (has("Transformer Engine") or has("apex")),
            "Transformer Engine" if has("Transformer Engine") else "apex",
            "pip install -e '.[te]'; torch's AdamW serves until then" if cuda else NEEDS_GPU,
        ),
        _feature(
            "Transformer Engine modules and FP8 compute",
            cuda and has_sound_transformer_engine(te_version),
            f"transformer-engine {te_version}",
            f"pip install 'transformer-engine[pytorch]>={MINIMUM_TE_TEXT},<3'; the local modules "
            "serve until then"
            if cuda
            else NEEDS_GPU,
        ),
        _feature(
            "FP8 storage of activations",
            not problems(machine),
            "Triton kernels where the GPU has E4M3" if cuda and has("triton") else "plain torch",
            "see the problems below",
        ),
        _feature(
            "symmetric products in Triton",
            cuda and has("triton"),
            "on Hopper for matrices of 2,048 rows and more, where an H200 was measured; "
            "--muonclip-triton-symmetric has them all",
            "pip install triton" if cuda else NEEDS_GPU,
        ),
        _feature(
            "Megatron's compiled fusions",
            cuda and has("triton") and machine.c_compiler is not None,
            f"torch.compile with triton and {machine.c_compiler}",
            "pip install triton, and a C compiler (apt-get install gcc)" if cuda else NEEDS_GPU,
        ),
    ]


COMPANIONS = (
    (
        "Hugging Face tokenizers and --train-bpe",
        "tokenizers",
        "tokenizers",
        "pip install -e '.[data]'",
    ),
    ("K2's own tokenizer", "tiktoken", "tiktoken", "pip install -e '.[data]'"),
    ("the server", "fastapi", "fastapi", "pip install -e '.[serve]'"),
    ("dialogues from Parquet tables", "pyarrow", "pyarrow", "pip install -e '.[parquet]'"),
    (
        "loading exports in transformers",
        "transformers",
        "transformers; exporting itself does without",
        "pip install -e '.[data]'; exporting itself does without",
    ),
    (
        "Megatron-Bridge configs",
        "Megatron-Bridge",
        "megatron-bridge",
        "pip install --no-deps 'megatron-bridge>=0.6.2,<0.7'",
    ),
)
"""(feature, the distribution that gives it, what it rests on, the way to get it)."""


LEPTONAI_WITHOUT_V1 = (0, 47)
"""The first leptonai without the module that NeMo-Run imports."""


def _companions(machine: Machine) -> list[Feature]:
    leptonai = machine.versions["leptonai"]
    has_v1 = leptonai is None or release(leptonai) < LEPTONAI_WITHOUT_V1
    return [
        *(_feature(name, machine.has(on), note, way) for name, on, note, way in COMPANIONS),
        _feature(
            "launching through NeMo-Run",
            machine.has("NeMo-Run") and has_v1,
            "nemo-run",
            "pip install -e '.[launch]'"
            + ("" if has_v1 else f"; leptonai {leptonai} makes NeMo-Run's import fail"),
        ),
    ]


def as_dict(machine: Machine) -> dict[str, Any]:
    """Facts, features and problems, ready for JSON."""
    return {
        "machine": dataclasses.asdict(machine),
        "features": [dataclasses.asdict(feature) for feature in features(machine)],
        "problems": problems(machine),
    }
