"""Which tokens an indexed dataset holds, told without reading all of them.

A path stays when a corpus is prepared anew; what was derived from it (Megatron's sample index, a
run's count of consumed samples) belongs to its content.
"""

import functools
import hashlib
import os
from pathlib import Path

from megatron_k2.data.indexed import bin_path, idx_path

REMOTE = "://"
"""Part of a path that lies on a remote store, which cannot be looked at here."""
WHOLE_BYTES = 64 << 20
"""A ``.bin`` up to this size is read whole."""
WINDOWS, WINDOW_BYTES = 64, 1 << 20
"""What is read of a larger one: so many pieces of that size, from its first byte to its last."""


def content_hash(prefix: str) -> str | None:
    """sha256 of ``prefix``'s content; ``None`` for what is absent, or on a remote store.

    It covers the ``.idx`` whole, so every document's length and place, the size of the ``.bin``,
    and its tokens: all up to 64 MiB, of a larger one 64 windows of 1 MiB. Tokens exchanged outside
    of them, with no length changed, are not seen.
    """
    if REMOTE in prefix:
        return None
    index, tokens = idx_path(Path(prefix)), bin_path(Path(prefix))
    if not (index.is_file() and tokens.is_file()):
        return None
    return _hash(index, tokens, *(_version(path) for path in (index, tokens)))


def _version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@functools.lru_cache(maxsize=4096)
def _hash(index: Path, tokens: Path, *versions: tuple[int, int, int]) -> str:
    """``versions`` make a file that was replaced another argument."""
    size = versions[1][0]
    with index.open("rb") as stream:
        digest = hashlib.sha256(hashlib.file_digest(stream, "sha256").digest())
    digest.update(size.to_bytes(8))
    with tokens.open("rb") as stream:
        if size <= WHOLE_BYTES:
            digest.update(stream.read())
        else:
            for window in range(WINDOWS):
                start = window * (size - WINDOW_BYTES) // (WINDOWS - 1)
                digest.update(os.pread(stream.fileno(), WINDOW_BYTES, start))
    return digest.hexdigest()
