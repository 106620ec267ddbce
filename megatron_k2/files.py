"""Files that are either whole or absent, and the hashes that name them."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_file(temporary: Path, final: Path) -> None:
    """Give a finished temporary file its final name: fsync, rename, fsync of the directory."""
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(final)
    sync_directory(final.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` so that a kill leaves the old file or the new one, never half of it."""
    # The process id keeps an orphaned worker of a killed run away from its successor's file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_bytes(content)
    commit_file(temporary, path)


def sha256_of_files(paths: Iterable[Path]) -> str:
    """One hash over names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash of a JSON-able value in canonical spelling (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
