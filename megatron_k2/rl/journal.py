"""An append-only file of records, each chained to the one before it, and payloads beside it.

    journal.jsonl          a record a line: hash of (the line before's hash, this line's text), text
    payload/0000012.bin    what records of segment 12 refer to

A kill leaves at most a last line that is not whole: it is cut off, with a sentence, and what it
said is done again. Any other line or payload that is not as it was written is refused: what follows
from it cannot be known. A machine that loses power keeps what was written before the last durable
record, payloads included. Payload files of old segments may be removed; the lines stay, and are
small.
"""

import json
import os
from collections.abc import Callable, Collection
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from megatron_k2.files import sync_directory
from megatron_k2.rl.journal_reader import (
    JOURNAL,
    PAYLOAD,
    JournalReader,
    Payload,
    Ref,
    chained,
    short_hash,
)


class Sizes(NamedTuple):
    """What a journal takes on disk."""

    journal_bytes: int
    payload_bytes: dict[int, int]
    """By segment, of those that are there."""

    def __str__(self) -> str:
        total, files = sum(self.payload_bytes.values()), len(self.payload_bytes)
        return f"{self.journal_bytes:,} bytes of records, {total:,} of payload in {files} files"


def _write_all(stream: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]


class Journal(JournalReader):
    """Open, to read what is there and to append.

    Args:
        folder: made where it is absent; the caller holds its lock.
        tell: is called with a sentence where a torn end was cut off.

    Raises:
        UserError: a line that is not as it was written, and is not the last.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        (folder / PAYLOAD).mkdir(parents=True, exist_ok=True)
        (folder / JOURNAL).touch()
        super().__init__(folder)
        if torn := self.path.stat().st_size - self.end:
            tell(
                f"{self.path}: the last record was not whole ({torn:,} bytes) and was cut off; "
                "what it said is done again"
            )
        self._stream = self.path.open("r+b", buffering=0)
        self._stream.truncate(self.end)
        self._stream.seek(self.end)
        os.fsync(self._stream.fileno())
        sync_directory(folder)
        self._segment: int | None = None
        self._payload: FileIO | None = None

    def append(self, record: dict[str, Any], *, is_durable: bool = True) -> int:
        """Write a record; its number.

        Args:
            record: JSON.
            is_durable: whether it, and all before it, is on disk when this returns.
        """
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        encoded = text.encode()
        chain = chained(self.chain, encoded)
        if self._payload is not None and is_durable:
            os.fsync(self._payload.fileno())
        offset, line = self.end, chain.encode() + b" " + encoded + b"\n"
        try:
            _write_all(self._stream, line)
            if is_durable:
                os.fsync(self._stream.fileno())
        except OSError:  # a full disk: half a line must not get a successor
            self._stream.truncate(offset)
            self._stream.seek(offset)
            raise
        self.chain = chain
        self.end += len(line)
        self.offsets.append(offset)
        return len(self.offsets) - 1

    def put(self, segment: int, payload: Payload) -> Ref:
        """Write a payload; durable with the next durable record."""
        packed = payload.packed()
        if self._payload is None or self._segment != segment:
            self.close_payload()
            self._payload = self.file(segment).open("ab", buffering=0)
            sync_directory(self.folder / PAYLOAD)
            self._segment = segment
        offset = self._payload.seek(0, os.SEEK_END)
        _write_all(self._payload, packed)
        return Ref(segment, offset, len(packed), short_hash(packed))

    def segments(self) -> list[int]:
        """Those that are there."""
        return sorted(int(path.stem) for path in (self.folder / PAYLOAD).glob("*.bin"))

    def sizes(self) -> Sizes:
        """What all of it takes."""
        payload = {each: self.file(each).stat().st_size for each in self.segments()}
        return Sizes(self.path.stat().st_size, payload)

    def remove(self, segments: Collection[int]) -> int:
        """Remove segments' payloads; how many bytes that were."""
        removed = 0
        for segment in segments:
            if segment == self._segment:
                self.close_payload()
            path = self.file(segment)
            removed += path.stat().st_size
            path.unlink()
        sync_directory(self.folder / PAYLOAD)
        return removed

    def close_payload(self) -> None:
        """End the open payload file, durably."""
        if self._payload is not None:
            os.fsync(self._payload.fileno())
            self._payload.close()
        self._payload = self._segment = None

    def close(self) -> None:
        """Append nothing more."""
        self.close_payload()
        self._stream.close()
