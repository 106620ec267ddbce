"""Files mapped into memory, opened once each: reading costs page cache, no anonymous memory."""

import mmap
from pathlib import Path


class MappedFiles:
    """Maps on request, kept for the life of the owner."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def map(self, path: Path) -> mmap.mmap:
        """The whole file."""
        if path not in self._maps:
            with path.open("rb") as stream:
                # Private and writable only because torch warns of read-only buffers; nobody writes.
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            self._maps[path] = mapped
        return self._maps[path]
