"""Files mapped into memory, opened once each: reading costs page cache, no anonymous memory."""

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_POPULATE_READ = 22  # MADV_POPULATE_READ, of Linux 5.14; elsewhere refused, without harm


class MappedFiles:
    """Maps on request, kept for the life of the owner."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def map(self, path: Path) -> mmap.mmap:
        """Map the whole of ``path`` for reading, or return the map made before."""
        if path not in self._maps:
            with path.open("rb") as stream:
                # Private and writable only because torch warns of read-only buffers; nobody writes.
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            self._maps[path] = mapped
        return self._maps[path]


def bring_in(bits: np.ndarray) -> np.ndarray:
    """All pages of a contiguous view by one call, not by a fault every 64 KiB; the view itself."""
    if (madvise := _madvise()) is not None and bits.nbytes > mmap.PAGESIZE:
        address = bits.ctypes.data
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        length = ctypes.c_size_t(address + bits.nbytes - begin)
        madvise(ctypes.c_void_p(begin), length, _POPULATE_READ)
    return bits


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), "madvise", None)
