"""An append-only file of records, each chained to the one before it, and payloads beside it.

    journal.jsonl          a record a line: hash of (the line before's hash, this line's text), text
    payload/0000012.bin    what records of segment 12 refer to, compressed

A kill leaves at most a last line that is not whole: it is cut off, with a sentence, and what it
said is done again. Any other line or payload that is not as it was written is refused: what follows
from it cannot be known. A machine that loses power keeps what was written before the last durable
record, payloads included. Payload files of old segments may be removed; the lines stay, and are
small.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from megatron_k2.errors import UserError
from megatron_k2.files import sync_directory

JOURNAL, PAYLOAD = "journal.jsonl", "payload"
_HASH_LETTERS = 32
_ORIGIN = "0" * _HASH_LETTERS


class Ref(NamedTuple):
    """Where a payload lies."""

    segment: int
    offset: int
    size: int
    """Bytes, compressed."""
    sha256: str
    """Its beginning, of the compressed bytes."""


class Sizes(NamedTuple):
    """What a journal takes on disk."""

    journal_bytes: int
    payload_bytes: dict[int, int]
    """By segment, of those that are there."""

    def __str__(self) -> str:
        total, files = sum(self.payload_bytes.values()), len(self.payload_bytes)
        return f"{self.journal_bytes:,} bytes of records, {total:,} of payload in {files} files"


class Position(NamedTuple):
    """A place in a journal that another file can name: how many lines, and the last one's hash."""

    num_lines: int
    chain: str


def _chained(before: str, text: bytes) -> str:
    return hashlib.sha256(before.encode() + text).hexdigest()[:_HASH_LETTERS]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _write_all(stream: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]


class Journal:
    """Open, to read what is there and to append.

    Args:
        folder: made where it is absent; the caller holds its lock.
        tell: is called with a sentence where a torn end was cut off.

    Raises:
        UserError: a line that is not as it was written, and is not the last.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        self._folder, self._path = folder, folder / JOURNAL
        (folder / PAYLOAD).mkdir(parents=True, exist_ok=True)
        self._path.touch()
        self._offsets: list[int] = []
        self._chain = _ORIGIN
        end = self._read_chain(tell)
        self._stream = self._path.open("r+b", buffering=0)
        self._stream.truncate(end)
        self._stream.seek(end)
        os.fsync(self._stream.fileno())
        sync_directory(folder)
        self._segment: int | None = None
        self._payload: FileIO | None = None

    def _read_chain(self, tell: Callable[[str], None]) -> int:
        """Check every line; returns where the last whole one ends."""
        offset, size = 0, self._path.stat().st_size
        with self._path.open("rb") as stream:
            for line in stream:
                chain, _, text = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or _chained(self._chain, text).encode() != chain:
                    self._refuse_unless_last(len(self._offsets) + 1, offset + len(line) == size)
                    tell(
                        f"{self._path}: the last record was not whole ({len(line):,} bytes) and "
                        "was cut off; what it said is done again"
                    )
                    return offset
                self._offsets.append(offset)
                self._chain = chain.decode()
                offset += len(line)
        return offset

    def _refuse_unless_last(self, number: int, is_last: bool) -> None:
        if not is_last:
            raise UserError(
                f"{self._path}:{number}: the record is not as it was written, and others follow "
                "it; restore the file from a copy, or begin a new run from a checkpoint"
            )

    @property
    def num_records(self) -> int:
        """Now."""
        return len(self._offsets)

    def position(self, num_lines: int) -> Position:
        """Where it was after so many lines."""
        return Position(num_lines, self._line(num_lines - 1)[0] if num_lines else _ORIGIN)

    def has(self, position: Position) -> bool:
        """Whether this journal was once at that position."""
        is_past = 0 <= position.num_lines <= len(self._offsets)
        return is_past and self.position(position.num_lines) == position

    def _line(self, number: int) -> tuple[str, bytes]:
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[number])
            chain, _, text = stream.readline().rstrip(b"\n").partition(b" ")
        return chain.decode(), text

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and content of every record, in order."""
        with self._path.open("rb") as stream:
            for number in range(len(self._offsets)):
                yield number, json.loads(stream.readline().partition(b" ")[2])

    def record(self, number: int) -> dict[str, Any]:
        """One again."""
        return json.loads(self._line(number)[1])

    def append(self, record: dict[str, Any], *, is_durable: bool = True) -> int:
        """Write a record; its number.

        Args:
            record: JSON.
            is_durable: whether it, and all before it, is on disk when this returns.
        """
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        encoded = text.encode()
        chain = _chained(self._chain, encoded)
        if self._payload is not None and is_durable:
            os.fsync(self._payload.fileno())
        offset = self._stream.tell()
        try:
            _write_all(self._stream, chain.encode() + b" " + encoded + b"\n")
            if is_durable:
                os.fsync(self._stream.fileno())
        except OSError:  # a full disk: half a line must not get a successor
            self._stream.truncate(offset)
            self._stream.seek(offset)
            raise
        self._chain = chain
        self._offsets.append(offset)
        return len(self._offsets) - 1

    def put(self, segment: int, content: Any) -> Ref:
        """Write a payload, JSON; durable with the next durable record."""
        packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)
        if self._payload is None or self._segment != segment:
            self.close_payload()
            self._payload = self._file(segment).open("ab", buffering=0)
            sync_directory(self._folder / PAYLOAD)
            self._segment = segment
        offset = self._payload.seek(0, os.SEEK_END)
        _write_all(self._payload, packed)
        return Ref(segment, offset, len(packed), _short(packed))

    def get(self, ref: Ref) -> Any:
        """A payload again.

        Raises:
            UserError: it is gone, or not as it was written.
        """
        path = self._file(ref.segment)
        if not path.exists():
            raise UserError(f"{path} was removed, and is needed to go on from here; restore it")
        with path.open("rb") as stream:
            stream.seek(ref.offset)
            packed = stream.read(ref.size)
        if _short(packed) != ref.sha256:
            raise UserError(
                f"{path}: {ref.size:,} bytes at {ref.offset:,} are not as they were written; "
                "restore the file from a copy, or begin a new run from a checkpoint"
            )
        return json.loads(zlib.decompress(packed))

    def _file(self, segment: int) -> Path:
        return self._folder / PAYLOAD / f"{segment:07d}.bin"

    def segments(self) -> list[int]:
        """Those that are there."""
        return sorted(int(path.stem) for path in (self._folder / PAYLOAD).glob("*.bin"))

    def sizes(self) -> Sizes:
        """What all of it takes."""
        payload = {each: self._file(each).stat().st_size for each in self.segments()}
        return Sizes(self._path.stat().st_size, payload)

    def remove(self, segments: Collection[int]) -> int:
        """Remove segments' payloads; how many bytes that were."""
        removed = 0
        for segment in segments:
            if segment == self._segment:
                self.close_payload()
            path = self._file(segment)
            removed += path.stat().st_size
            path.unlink()
        sync_directory(self._folder / PAYLOAD)
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
