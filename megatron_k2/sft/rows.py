"""Objects of JSON lines, arrays and Parquet tables, each with its place, the bad ones too."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.data.kinds import (
    BYTE_ORDER_MARK,
    Kind,
    check_is_here,
    kind_of,
    opened,
    read_array,
)
from megatron_k2.data.parts import Span
from megatron_k2.data.sources import SourceFile, read_lines
from megatron_k2.errors import UserError
from megatron_k2.records.read import read_json_line

PARQUET_SUFFIX = ".parquet"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", PARQUET_SUFFIX)
"""What is taken from a directory."""
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Row:
    """One object of a file."""

    place: int
    """Byte at which its line begins; of an array or a table, its number from 0."""
    value: dict[str, Any] | None
    problem: str = ""
    """Why there is no value."""


def kind_of_dialogues(path: Path) -> Kind:
    """How a file holds dialogues.

    Raises:
        UserError: it holds text, or is packed by what is not read.
    """
    if path.name.lower().endswith(PARQUET_SUFFIX):
        return "parquet"
    if (kind := kind_of(path)) == "text":
        raise UserError(f"{path}: dialogues are read from {', '.join(SUFFIXES)}; convert the file")
    return kind


def read_rows(span: Span) -> Iterator[Row]:
    """Every row of a span, good or bad.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    match span.file.kind:
        case "lines":
            end = span.end if span.file.can_be_cut else sys.maxsize
            for offset, line in read_lines(span.file, span.start, end):
                yield _row(offset, line if offset else line.removeprefix(BYTE_ORDER_MARK))
        case "array":
            for number, value in enumerate(read_array(span.file.path)):
                is_object = isinstance(value, dict)
                found = f"expected a JSON object, found {type(value).__name__}"
                yield Row(number, value) if is_object else Row(number, None, found)
        case _:
            yield from _table_rows(span.file.path)


def _row(offset: int, line: bytes) -> Row:
    try:
        return Row(offset, read_json_line(line))
    except ValueError as problem:
        return Row(offset, None, str(problem))


def _table_rows(path: Path) -> Iterator[Row]:
    check_is_here(path)
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{path}: Parquet is read with pyarrow, which is not installed; pip install "
            '"megatron-k2[parquet]", or write the rows as .jsonl'
        ) from None
    try:
        table = ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            for value in batch.to_pylist():
                yield Row(number, _without_nulls(value))
                number += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({error}); copy it again") from None


def _without_nulls(value: Any) -> Any:
    """A table's struct has every field any row has; what is null in this one was absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def line_numbers(file: SourceFile, places: Iterable[int]) -> dict[int, int]:
    """1-based line of each place, in one pass; of an array or a table, the 1-based row."""
    if file.kind != "lines":
        return {place: place + 1 for place in places}
    wanted, found = sorted(set(places)), {}
    number, before = 1, 0
    with opened(file.path) as stream:
        for place in wanted:
            while before < place and (block := stream.read(min(place - before, 1 << 20))):
                number += block.count(b"\n")
                before += len(block)
            found[place] = number
    return found
