"""A file of a conversion while it is written: front to back, once, to end on the disk.

A conversion that rounds nothing is the kernel's work on pages, so that is what is saved here: room
is allocated at once rather than page by page, and the disk begins before the file is finished. Both
are hints; where a system does not take them, nothing but time is lost.
"""

import ctypes
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WRITEBACK_BYTES = 16 * 2**20
"""After so many the disk is told to begin."""

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE


class OutputFile(io.BufferedWriter):
    """Opened anew for writing, with room for what is to come."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Open.

        Args:
            path: the file.
            num_bytes: at least so many will be written.
        """
        super().__init__(io.FileIO(path, "w"))
        self._handed_over = 0
        if (fallocate := _fallocate()) is not None:
            # A disk without so much room is found by the write that meets its end
            fallocate(self.fileno(), _KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(num_bytes))

    @override
    def write(self, buffer: "ReadableBuffer", /) -> int:
        """Append; from time to time the disk gets what has been gathered."""
        num_bytes = super().write(buffer)
        end = self.tell()
        if end - self._handed_over >= WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            self.flush()
            # Linux starts to write dirty pages that it is told are not needed, and keeps them
            size = end - self._handed_over
            os.posix_fadvise(self.fileno(), self._handed_over, size, os.POSIX_FADV_DONTNEED)
            self._handed_over = end
        return num_bytes

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        self.flush()
        os.fsync(self.fileno())


@functools.cache
def _fallocate() -> Callable[..., Any] | None:
    """Linux's own: ``os.posix_fallocate`` writes to every page where a file system has none."""
    return getattr(ctypes.CDLL(None), "fallocate", None)
