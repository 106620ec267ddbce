"""One archive that proves a machine without internet: this checkout, its wheels, a script.

    python scripts/make_bundle.py dist      # needs a package index; the archive needs none

The wheels are the versions installed here, for Python 3.12 on x86-64 with glibc 2.28 and newer.
Torch and what comes with it are the machine's own; figures, event files and the hub's transfer
library are left out, which nothing of the self-check needs.
"""

import argparse
import importlib.metadata as metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "megatron_k2-selfcheck"
ROOTS = (
    *("megatron-core", "emerging-optimizers", "numpy", "psutil", "safetensors", "rich"),
    *("transformers", "tokenizers", "tiktoken", "pytest", "pytest-xdist", "hypothesis"),
)
"""What the package and its tests import; what these need is found by their metadata."""
LEFT_OUT = ("torch", "triton", "matplotlib", "tensorboard", "hf-xet", "setuptools")
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")
LIMIT_BYTES = 60 << 20


def normal(name: str) -> str:
    """A distribution's name as indices spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(roots: tuple[str, ...] = ROOTS) -> dict[str, str]:
    """Name -> version installed here, of the roots and all that they need, but for ``LEFT_OUT``."""
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = normal(waiting.pop())
        if name in found or name in LEFT_OUT:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # behind a marker of another platform
        found[name] = distribution.version
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                waiting.append(re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0])
    return found


def download(packages: dict[str, str], folder: Path) -> None:
    """Wheels of ``packages`` into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", f"manylinux_{platform}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--dest", str(folder)]
    subprocess.run([*command, *(f"{n}=={v}" for n, v in packages.items())], check=True)


def own_sources(folder: Path) -> None:
    """The checkout as git has it, and the package as it is installed: with recipes in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith("docs/images/") or not (ROOT / name).is_file():
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    with tempfile.TemporaryDirectory() as built:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        command += ["--no-build-isolation", "--wheel-dir", built, str(folder)]
        subprocess.run(command, check=True)
        (wheel,) = Path(built).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
    for made in (folder / "build", *folder.glob("*.egg-info")):
        shutil.rmtree(made, ignore_errors=True)


def make(out: Path) -> Path:
    """Write the archive into ``out``.

    Raises:
        SystemExit: where it is too large to carry.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / NAME
        download(pinned(), inside / "wheels")
        own_sources(inside / "src")
        for script in ("selfcheck.sh", "unpack.py", "with_loopback.py"):
            shutil.copy2(ROOT / "scripts" / script, inside / script)
        partial = out / f".{NAME}.partial"
        with tarfile.open(partial, "w:gz") as archive:
            archive.add(inside, NAME)
    size = partial.stat().st_size
    if size > LIMIT_BYTES:
        partial.unlink()
        sys.exit(f"the archive has {size / 2**20:.1f} MiB, more than {LIMIT_BYTES >> 20}")
    return partial.replace(out / f"{NAME}.tar.gz")


def main() -> None:
    """Build it and say its size."""
    parser = argparse.ArgumentParser(description="archive for machines without internet")
    parser.add_argument("out", type=Path, help="directory of the archive")
    archive = make(parser.parse_args().out)
    size = archive.stat().st_size / 2**20
    print(f"{archive}: {size:.1f} MiB\n  tar xzf {archive.name} && bash {NAME}/selfcheck.sh")


if __name__ == "__main__":
    main()
