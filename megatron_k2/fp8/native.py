"""The C functions of this directory, compiled once a machine: where eager torch is slow.

By the C compiler that the installation needs anyway, into the user's cache. Imports no torch.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("tiles.c", "blocks.c")
# No contraction: a fused multiply-add would round once where torch rounds twice. No traps: else a
# number that is then not chosen must not be computed, and a loop with a choice stays scalar.
FLAGS = "-O3 -march=native -ffp-contract=off -fno-trapping-math -shared -fPIC".split()


@functools.cache
def library() -> Any:
    """The compiled functions, or None where they cannot be had."""
    try:
        path = _cache() / f"fp8-{_fingerprint()}.so"
        if not path.exists():
            _compile(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("FP8 by torch operations: %s cannot be compiled here (%s)", FOLDER, error)
        return None


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "megatron_k2"


def _fingerprint() -> str:
    """Of the sources, the flags and the processor: ``-march=native`` is for one kind of it."""
    found = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(FOLDER.glob("*.[ch]")):
        found.update(path.read_bytes())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = {line for line in lines if line.startswith(("flags", "Features"))}
        found.update("".join(sorted(features)).encode())
    return found.hexdigest()[:16]


def _compile(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        sources = [str(FOLDER / name) for name in SOURCES]
        command = [os.environ.get("CC", "cc"), *FLAGS, *sources, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        built.rename(path)  # whole, or not there: several ranks may do this at once
