"""A journal as others than its writer see it: records and payloads, checked as they are read.

Whoever writes a journal (``journal.py``) may be at it meanwhile: a line that is not whole yet is no
line yet, and is looked at again.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_k2.errors import UserError

JOURNAL, PAYLOAD = "journal.jsonl", "payload"
_HASH_LETTERS = 32
_ORIGIN = "0" * _HASH_LETTERS


_JSON_SIZE = struct.Struct("<I")


class Payload(NamedTuple):
    """What is too long for a record."""

    content: Any
    """JSON; it is compressed."""
    raw: bytes = b""
    """Of any form; it lies as it is."""

    def packed(self) -> bytes:
        """The JSON's size, compressed, then the JSON, then the rest."""
        text = zlib.compress(json.dumps(self.content, separators=(",", ":")).encode(), 1)
        return _JSON_SIZE.pack(len(text)) + text + self.raw

    @classmethod
    def unpacked(cls, packed: bytes) -> "Payload":
        """The reverse."""
        end = _JSON_SIZE.size + _JSON_SIZE.unpack_from(packed)[0]
        return cls(json.loads(zlib.decompress(packed[_JSON_SIZE.size : end])), packed[end:])


class Ref(NamedTuple):
    """Where a payload lies."""

    segment: int
    offset: int
    size: int
    """Bytes, as they lie."""
    sha256: str
    """Its beginning, of those bytes."""


class Position(NamedTuple):
    """A place in a journal that another file can name: how many lines, and the last one's hash."""

    num_lines: int
    chain: str


def chained(before: str, text: bytes) -> str:
    """The hash of a line's text and all before it."""
    return hashlib.sha256(before.encode() + text).hexdigest()[:_HASH_LETTERS]


def short_hash(content: bytes) -> str:
    """Of a payload."""
    return hashlib.sha256(content).hexdigest()[:16]


class JournalReader:
    """What a folder holds; nothing of it is changed.

    Args:
        folder: of the journal.

    Raises:
        UserError: a line that is not as it was written, and is not the last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self.offsets: list[int] = []
        """Of the lines, in bytes."""
        self.chain = _ORIGIN
        """Hash of the last line."""
        self.end = 0
        """Where it ends."""
        self.look()

    def look(self) -> None:
        """Check and take up the lines that have come since."""
        if not self.path.exists():
            return
        size = self.path.stat().st_size
        with self.path.open("rb") as stream:
            stream.seek(self.end)
            for line in stream:
                chain, _, text = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or chained(self.chain, text).encode() != chain:
                    self._refuse_unless_last(self.end + len(line) >= size)
                    return
                self.offsets.append(self.end)
                self.chain = chain.decode()
                self.end += len(line)

    def _refuse_unless_last(self, is_last: bool) -> None:
        if not is_last:
            raise UserError(
                f"{self.path}:{self.num_records + 1}: the record is not as it was written, and "
                "others follow it; restore the file from a copy, or begin a new run from a "
                "checkpoint"
            )

    @property
    def num_records(self) -> int:
        """That were seen."""
        return len(self.offsets)

    def position(self, num_lines: int) -> Position:
        """Where it was after so many lines."""
        return Position(num_lines, self._line(num_lines - 1)[0] if num_lines else _ORIGIN)

    def has(self, position: Position) -> bool:
        """Whether this journal was once at that position."""
        is_past = 0 <= position.num_lines <= len(self.offsets)
        return is_past and self.position(position.num_lines) == position

    def _line(self, number: int) -> tuple[str, bytes]:
        with self.path.open("rb") as stream:
            stream.seek(self.offsets[number])
            chain, _, text = stream.readline().rstrip(b"\n").partition(b" ")
        return chain.decode(), text

    def records(self, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and content of every record from ``first`` on, in order."""
        if first >= self.num_records:
            return
        with self.path.open("rb") as stream:
            stream.seek(self.offsets[first])
            for number in range(first, self.num_records):
                yield number, json.loads(stream.readline().partition(b" ")[2])

    def record(self, number: int) -> dict[str, Any]:
        """One again."""
        return json.loads(self._line(number)[1])

    def get(self, ref: Ref) -> Payload:
        """A payload again.

        Raises:
            UserError: it is gone, or not as it was written.
        """
        path = self.file(ref.segment)
        if not path.exists():
            raise UserError(f"{path} was removed, and is needed to go on from here; restore it")
        with path.open("rb") as stream:
            stream.seek(ref.offset)
            packed = stream.read(ref.size)
        if short_hash(packed) != ref.sha256:
            raise UserError(
                f"{path}: {ref.size:,} bytes at {ref.offset:,} are not as they were written; "
                "restore the file from a copy, or begin a new run from a checkpoint"
            )
        return Payload.unpacked(packed)

    def file(self, segment: int) -> Path:
        """Of a segment's payloads."""
        return self.folder / PAYLOAD / f"{segment:07d}.bin"
