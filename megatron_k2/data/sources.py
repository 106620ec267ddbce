"""Where documents come from: text files, directories, JSONL, the Python standard library.

A document has an id that does not depend on the machine: the file's path below the input that named
it, and for a JSONL line also the byte at which the line starts. Train and validation are split by a
hash of the id, so no document is in both, and adding files moves none of the others.
"""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.data.kinds import (
    BYTE_ORDER_MARK,
    GZIP_SUFFIX,
    JSON_SUFFIX,
    LINE_SUFFIXES,
    UNREAD_SUFFIXES,
    Kind,
    check_is_here,
    check_is_text,
    is_packed,
    kind_of,
    opened,
    read_array,
)
from megatron_k2.errors import UserError

DEFAULT_SUFFIXES = (".txt", ".md", *LINE_SUFFIXES)
"""What is taken from a directory unless ``--suffix`` says otherwise; in any case."""
_LIKELY_DOCUMENTS = (JSON_SUFFIX, *LINE_SUFFIXES, GZIP_SUFFIX, *UNREAD_SUFFIXES)
"""What a person who names a directory may think is taken from it."""
_WHOLE_FILE = sys.maxsize

_STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True)
class SourceFile:
    """One input file, with what its identity is judged by."""

    path: Path
    name: str
    """POSIX path below the input that named it: stable across machines."""
    num_bytes: int
    """As it lies on disk."""
    modified_ns: int
    kind: Kind

    @property
    def is_json(self) -> bool:
        """Objects whose text lies under a key, rather than one text."""
        return self.kind != "text"

    @property
    def can_be_cut(self) -> bool:
        """Whether any byte range of it can be read on its own."""
        return self.kind == "lines" and not is_packed(self.path)


@dataclass(frozen=True)
class Document:
    """A document as read, before tokens."""

    id: str
    text: str
    num_bytes: int
    """Bytes it took in the source file, line end included; of an array's element, its text's."""


def _source_file(path: Path, name: str, kind: Callable[[Path], Kind] = kind_of) -> SourceFile:
    status = path.stat()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns, kind(path))


def _ends_in(name: str, suffixes: Iterable[str]) -> bool:
    return name.lower().endswith(tuple(suffix.lower() for suffix in suffixes))


def passed_over(inputs: Sequence[Path], suffixes: Sequence[str]) -> dict[str, int]:
    """Files of the directories that are not taken but look like documents: ending -> number."""
    found: dict[str, int] = {}
    for root in (path for path in inputs if path.is_dir()):
        for _, _, files in root.walk():
            for name in files:
                if not _ends_in(name, suffixes) and _ends_in(name, _LIKELY_DOCUMENTS):
                    ending = "".join(Path(name).suffixes[-2:]).lower()
                    found[ending] = found.get(ending, 0) + 1
    return found


def _below(
    root: Path,
    suffixes: Sequence[str],
    skipped: frozenset[str],
    kind: Callable[[Path], Kind] = kind_of,
) -> list[SourceFile]:
    """Files under ``root`` by suffix, ordered by their relative POSIX path."""
    found = []
    for directory, names, files in root.walk():
        names[:] = [n for n in names if n not in skipped]
        for file in files:
            if _ends_in(file, suffixes) and (directory / file).is_file():
                path = directory / file
                found.append(_source_file(path, path.relative_to(root).as_posix(), kind))
    return sorted(found, key=lambda f: f.name)


def find_files(
    inputs: Sequence[Path], suffixes: Sequence[str], kind: Callable[[Path], Kind] = kind_of
) -> list[SourceFile]:
    """Expand files and directories, in the order given; a directory's files by path.

    Args:
        inputs: Files (taken whatever their suffix) and directories (recursive).
        suffixes: Which files of a directory to take, such as ``(".txt", ".jsonl")``.
        kind: Tells how a file holds documents; refuses what is not read.

    Raises:
        UserError: an input is missing, a directory has no such file, or a file is named twice.
    """
    found: list[SourceFile] = []
    for root in inputs:
        if root.is_dir():
            below = _below(root, suffixes, frozenset(), kind)
            if not below:
                raise UserError(
                    f"{root}: no file ends in {' '.join(suffixes)}; choose others with --suffix"
                )
            found.extend(below)
        elif root.is_file():
            found.append(_source_file(root, root.name, kind))
        else:
            raise UserError(f"input {root} does not exist; expected a file or a directory")
    seen: set[Path] = set()
    for file in found:
        if file.path.resolve() in seen:
            raise UserError(f"{file.path} is named twice by the inputs; name it once")
        seen.add(file.path.resolve())
    return found


def python_stdlib_files() -> list[SourceFile]:
    """The running interpreter's own ``.py`` files without tests: about 12 MB on every machine.

    Raises:
        UserError: if this interpreter has no standard library as files (an embedded one).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _below(root, (".py",), _STDLIB_SKIPPED) if root.is_dir() else []
    if not files:
        raise UserError(f"no Python source under {root}; use --input with text of your own")
    return files


def is_validation(document_id: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a hash of its id, uniform in [0, 1)."""
    digest = hashlib.sha256(document_id.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < fraction * 2.0**64


def read_text_file(file: SourceFile) -> Document:
    """A whole file as one document.

    Raises:
        UserError: the file is not UTF-8 (names the byte), or JSON under a text's name.
    """
    with opened(file.path) as stream:
        content = stream.read()
    try:
        text = content.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path}: not UTF-8 at byte {error.start} ({error.reason}); convert the file, or "
            "leave it out with --suffix"
        ) from None
    check_is_here(file.path)
    check_is_text(file.path, text)
    return Document(file.name, text, len(content))


def read_json(file: SourceFile, key: str, start: int, end: int) -> Iterator[Document]:
    """Documents of a JSON file; a byte range is heeded where the file can be cut.

    Raises:
        UserError: see ``read_jsonl_range`` and ``kinds.read_array``.
    """
    if file.can_be_cut:
        yield from read_jsonl_range(file, key, start, end)
    elif file.kind == "lines":
        yield from read_jsonl_range(file, key, 0, _WHOLE_FILE)
    else:
        for number, record in enumerate(read_array(file.path)):
            try:
                text = _text_of(record, key)
            except ValueError as problem:
                raise UserError(f"{file.path}, element {number + 1}: {problem}") from None
            yield Document(f"{file.name}[{number}]", text, len(text.encode()))


def read_jsonl_range(file: SourceFile, key: str, start: int, end: int) -> Iterator[Document]:
    """Documents of the lines whose first byte lies in [start, end).

    Raises:
        UserError: a malformed line; names file and line number.
    """
    for offset, line in read_lines(file, start, end):
        try:
            text = _text_of_line(line if offset else line.removeprefix(BYTE_ORDER_MARK), key)
        except ValueError as problem:
            check_is_here(file.path)
            number = line_number(file.path, offset)
            raise UserError(f"{file.path}:{number}: {problem}") from None
        yield Document(f"{file.name}@{offset}", text, len(line))


def read_lines(
    file: SourceFile, start: int = 0, end: int = _WHOLE_FILE
) -> Iterator[tuple[int, bytes]]:
    """Lines whose first byte lies in [start, end), each with the place of that byte.

    Ranges that tile a file read every line exactly once, whichever lines they cut through. Blank
    lines are skipped.
    """
    with opened(file.path) as stream:
        if start:
            # From one byte early: if that byte ends a line, ``start`` begins one and is ours.
            stream.seek(start - 1)
            stream.readline()
        while (offset := stream.tell()) < end and (line := stream.readline()):
            if not line.isspace():
                yield offset, line


def _text_of_line(line: bytes, key: str) -> str:
    """The document's text; a ValueError says what is wrong with the line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        alone = "; a CR alone does not end a line" if b"\r" in line.rstrip() else ""
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{alone}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except ValueError:  # Python's limit, whose own words name a function of Python's
        raise ValueError("not JSON that can be read: a number of thousands of digits") from None
    return _text_of(record, key)


def _text_of(record: Any, key: str) -> str:
    """The document's text; a ValueError says what is wrong with the object."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if key not in record:
        raise ValueError(
            f"no key '{key}' (keys: {', '.join(record)}); choose another with --json-key"
        )
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"'{key}' is {type(text).__name__}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"'{key}' has a lone surrogate at character {error.start}") from None
    return text


def line_number(path: Path, offset: int) -> int:
    """1-based number of the line at a byte offset; counted only when there is an error to show."""
    newlines = 0
    with opened(path) as stream:
        while offset > 0 and (block := stream.read(min(offset, 1 << 20))):
            newlines += block.count(b"\n")
            offset -= len(block)
    return newlines + 1
