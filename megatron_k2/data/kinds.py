"""How a file holds documents: told by its name in any case, and for ``.json`` by its beginning.

``.json`` is one object a line in Megatron's own tools, one array elsewhere. JSON's syntax is never
text: a file that holds it under another name is refused, as is one packed by what is not read.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from megatron_k2.errors import UserError

type Kind = Literal["text", "lines", "array", "parquet"]
"""One document a file, a JSON object a line, one JSON array (or a single object), or a table, which
only dialogues are read from."""

LINE_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIX = ".json"
GZIP_SUFFIX = ".gz"
UNREAD_SUFFIXES = {
    ".zst": "unpack it (zstd -d)",
    ".zstd": "unpack it (zstd -d)",
    ".xz": "unpack it (xz -d)",
    ".bz2": "unpack it (bunzip2)",
    ".lz4": "unpack it (lz4 -d)",
    ".zip": "unpack it (unzip)",
    ".tar": "unpack it (tar -xf)",
    ".tar.gz": "unpack it (tar -xf)",
    ".tgz": "unpack it (tar -xf)",
    ".7z": "unpack it (7z x)",
    ".parquet": "write its texts as .jsonl",
    ".arrow": "write its texts as .jsonl",
}
"""Endings of what is not read -> what makes it readable."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LFS = b"version https://git-lfs.github.com/spec/"
_LINES_LOOKED_AT = 3


def kind_of(path: Path) -> Kind:
    """How ``path`` holds documents.

    Raises:
        UserError: for what is packed by anything but gzip, or cannot be read.
    """
    name = path.name.lower()
    for suffix, way_out in UNREAD_SUFFIXES.items():
        if name.endswith(suffix):
            raise UserError(
                f"{path}: {suffix} is not read; {way_out}, or leave it out "
                "(of a directory with --suffix)"
            )
    name = name.removesuffix(GZIP_SUFFIX)
    if name.endswith(LINE_SUFFIXES):
        return "lines"
    return _kind_of_json(path) if name.endswith(JSON_SUFFIX) else "text"


def is_packed(path: Path) -> bool:
    """Whether it is read through gzip, from its beginning only."""
    return path.name.lower().endswith(GZIP_SUFFIX)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of ``path``, unpacked.

    Raises:
        UserError: while it is read, where it is no whole gzip file, or not readable.
    """
    try:
        with gzip.open(path, "rb") if is_packed(path) else path.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _kind_of_json(path: Path) -> Kind:
    with opened(path) as stream:
        first = next((line for line in stream if line.strip()), b"")
    return "lines" if not first or _is_object(first.removeprefix(BYTE_ORDER_MARK)) else "array"


def _is_object(text: bytes | str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_array(path: Path) -> list[Any]:
    """The elements of a ``.json`` file that is an array; of one that is an object, the object.

    Raises:
        UserError: where it is neither.
    """
    with opened(path) as stream:
        content = stream.read()
    try:
        value = json.loads(content.removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: neither one JSON object a line nor one array ({error}); repair it, or name "
            "a text file .txt"
        ) from None
    if not isinstance(value, list | dict):
        raise UserError(f"{path}: expected objects, found {type(value).__name__}; leave it out")
    return value if isinstance(value, list) else [value]


def check_is_here(path: Path) -> None:
    """Refuse the few lines that Git LFS leaves in a file's place.

    Raises:
        UserError: naming the file.
    """
    with path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise UserError(f"{path} is a Git LFS pointer, not the file; git lfs pull")


def check_is_text(path: Path, text: str) -> None:
    """Refuse what is not a document's text: JSON under another name.

    Raises:
        UserError: naming the file.
    """
    start = text.lstrip()
    if not start.startswith(("{", "[")):
        return
    lines = [line for line in start.split("\n", 2 * _LINES_LOOKED_AT) if line.strip()]
    if all(map(_is_object, lines[:_LINES_LOOKED_AT])):
        raise UserError(
            f"{path} holds JSON, one object a line, and its name says text; rename it to .jsonl"
        )
    try:
        value = json.loads(start)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) or (value and isinstance(value[0], dict)):
        raise UserError(f"{path} holds JSON, and its name says text; rename it to .json")
