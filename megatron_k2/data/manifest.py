"""``dataset.json``: what a prepared dataset directory holds.

The record between ``data prepare`` and everything that trains or evaluates. It is written last, so
a directory with a manifest is complete; reading checks that it still is. It holds no time and no
absolute path: the same inputs and options give the same bytes, and a directory can be moved.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_k2.data.indexed import bin_path, idx_path
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically

MANIFEST_FILE = "dataset.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the tokens."""

    kind: str
    path: str
    """Relative to the dataset's directory."""
    identity: str
    """sha256 over its files; a checkpoint trained on this data needs the same."""
    vocab_size: int
    eod_id: int


@dataclass(frozen=True)
class SplitRecord:
    """One split, an indexed dataset of Megatron's."""

    prefix: str
    """Relative to the dataset's directory, without ``.bin`` or ``.idx``."""
    num_documents: int
    num_tokens: int
    """EOD of each document included."""
    bin_bytes: int
    idx_bytes: int


@dataclass(frozen=True)
class SourceRecord:
    """The text that a dataset was made of."""

    description: str
    num_files: int
    num_bytes: int
    num_empty_documents: int
    """Documents of no text; they are left out."""
    content_sha256: str
    """Over splits, ids and texts of all documents, in order (a hash of the parts' hashes)."""


@dataclass(frozen=True)
class DataManifest:
    """The content of ``dataset.json``, which describes a prepared directory."""

    tokenizer: TokenizerRecord
    splits: dict[str, SplitRecord]
    """``train`` and, unless the fraction was 0, ``valid``."""
    source: SourceRecord
    plan_sha256: str
    """Hash of inputs (names, sizes, times), tokenizer and options; a rerun of the same command
    recognises its finished work by it."""
    schema_version: int = SCHEMA_VERSION


def write_manifest(directory: Path, manifest: DataManifest) -> None:
    """Write ``dataset.json``, whole or not at all."""
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"
    write_atomically(directory / MANIFEST_FILE, text.encode())


def read_manifest(directory: str | Path) -> DataManifest:
    """Read ``dataset.json`` and check that the files it names are there, whole.

    Raises:
        UserError: no such directory or manifest, a schema from another version, a data file that
            is missing or has another size than was written.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise UserError(
            f"dataset directory {directory} does not exist; see megatron-k2 data prepare"
        )
    if not path.is_file():
        raise UserError(
            f"{directory} has no {MANIFEST_FILE}: not a dataset, or its preparation was "
            "interrupted; run the same megatron-k2 data prepare command again"
        )
    manifest = _parse(path)
    for split in manifest.splits.values():
        prefix = directory / split.prefix
        _check_size(bin_path(prefix), split.bin_bytes)
        _check_size(idx_path(prefix), split.idx_bytes)
    return manifest


def _parse(path: Path) -> DataManifest:
    try:
        found = json.loads(path.read_bytes())
        version = found["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a dataset manifest ({error}); prepare again") from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version {version!r}, expected {SCHEMA_VERSION}; prepare the dataset "
            "with this version of megatron_k2"
        )
    try:
        manifest = DataManifest(
            tokenizer=TokenizerRecord(**found.pop("tokenizer")),
            splits={name: SplitRecord(**split) for name, split in found.pop("splits").items()},
            source=SourceRecord(**found.pop("source")),
            **found,
        )
        _check_types(manifest.tokenizer, manifest.source, *manifest.splits.values())
        return manifest
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged manifest ({error}); prepare again") from None


def _check_types(*records: TokenizerRecord | SourceRecord | SplitRecord) -> None:
    for record in records:
        for field in fields(record):
            value = getattr(record, field.name)
            if type(value) is not field.type or (isinstance(value, int) and value < 0):
                raise TypeError(f"{field.name} is {value!r}")


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the dataset again")
    actual = path.stat().st_size
    if actual != expected:
        state = "is empty" if actual == 0 else f"has {actual:,} bytes"
        raise UserError(f"{path} {state}, expected {expected:,}; prepare the dataset again")
