"""Files mapped into memory, opened once each: reading costs page cache, no anonymous memory.

A mapped file that someone makes shorter ends the process that reads beyond its new end (SIGBUS). So
its length is looked at before every read, pages are brought in by a call that can fail instead, and
what is computed with, not only written out, is read into memory first (``settled``).
"""

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.errors import UserError

_POPULATE_READ = 22  # MADV_POPULATE_READ, of Linux 5.14; elsewhere refused, without harm


class MappedFiles:
    """Maps on request, kept for the life of the owner."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._streams: dict[Path, FileIO] = {}

    def map(self, path: Path) -> mmap.mmap:
        """Map the whole of ``path`` for reading, or return the map made before.

        Raises:
            UserError: if the file has become shorter since.
        """
        if path not in self._maps:
            stream = path.open("rb", buffering=0)
            if os.fstat(stream.fileno()).st_size == 0:  # cannot be mapped
                stream.close()
                raise shortened(path)
            # Private and writable only because torch warns of read-only buffers; nobody writes.
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            self._maps[path], self._streams[path] = mapped, stream
        mapped = self._maps[path]
        if mapped.size() < len(mapped):
            raise shortened(path)
        return mapped

    def settled(self, bits: np.ndarray, path: Path) -> np.ndarray:
        """A contiguous view of the map of ``path``, read into memory of its own.

        Raises:
            UserError: if the file has become shorter.
        """
        begin = np.frombuffer(self._maps[path], np.uint8).ctypes.data
        made = np.empty(bits.shape, bits.dtype)
        rest, at = memoryview(made.reshape(-1).view(np.uint8)), bits.ctypes.data - begin
        while rest:
            num = os.preadv(self._streams[path].fileno(), [rest], at)
            if num == 0:
                raise shortened(path)
            rest, at = rest[num:], at + num
        return made


def shortened(path: Path) -> UserError:
    """What to say of a file that ends before what was in it when it was opened."""
    return UserError(
        f"{path} has become shorter while it was read; let the download or copy end, then run the "
        "same command again"
    )


def bring_in(bits: np.ndarray, path: Path) -> np.ndarray:
    """All pages of a contiguous view by one call, not by a fault every 64 KiB; the view itself.

    Raises:
        UserError: if the file has become shorter.
    """
    if (madvise := _madvise()) is not None and bits.nbytes > mmap.PAGESIZE:
        address = bits.ctypes.data
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        length = ctypes.c_size_t(address + bits.nbytes - begin)
        if madvise(ctypes.c_void_p(begin), length, _POPULATE_READ) != 0:
            if ctypes.get_errno() == errno.EFAULT:  # where a fault would be a SIGBUS
                raise shortened(path)
    return bits


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
