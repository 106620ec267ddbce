"""``chat.json``: what a prepared set of dialogues holds.

Written last, so a directory with it is complete; reading checks sizes. It holds no time and no
absolute path: the same inputs and options give the same bytes, and a directory can be moved.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_k2.data.manifest import TokenizerRecord
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.sft.packing import METHODS

MANIFEST_FILE = "chat.json"
SCHEMA_VERSION = 1
ARRAYS = ("tokens", "mask", "offsets", "weights")
"""Of a split, each a ``.npy``: see ``packed_set.Samples``."""


@dataclass(frozen=True)
class SplitRecord:
    """One split."""

    num_samples: int
    num_tokens: int
    num_trained_tokens: int
    num_sequences: int
    """At ``PackingRecord.sequence_length``."""
    fill: float
    """Share of those sequences' positions that hold a token."""
    file_bytes: dict[str, int]
    """Name of each file -> size."""


@dataclass(frozen=True)
class PackingRecord:
    """For which sequences the set was packed; others are packed when they are asked for."""

    sequence_length: int
    """Positions."""
    multiple: int
    method: str
    too_long: str


@dataclass(frozen=True)
class SourceRecord:
    """The dialogues read, and what became of them."""

    description: str
    num_files: int
    num_bytes: int
    num_read: int
    rejected: dict[str, int]
    """Reason -> number; each stands in ``rejects.jsonl``."""
    num_truncated: int
    """Cut to the sequence and kept."""
    content_sha256: str
    """Over ids, masks and weights of all parts, in order."""


@dataclass(frozen=True)
class ChatManifest:
    """The content of ``chat.json``."""

    tokenizer: TokenizerRecord
    template: dict[str, str | None]
    """Fields of ``chat.template.Format``, and what is trained."""
    splits: dict[str, SplitRecord]
    packing: PackingRecord
    source: SourceRecord
    plan_sha256: str
    schema_version: int = SCHEMA_VERSION


def packs_file(split: str, capacity: int, multiple: int, method: str) -> str:
    """Name of the file with a split's sequences."""
    assert method in METHODS
    return f"{split}.packs-{capacity}-{multiple}-{method}.npz"


def write_manifest(directory: Path, manifest: ChatManifest) -> None:
    """Write ``chat.json``, whole or not at all."""
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"
    write_atomically(directory / MANIFEST_FILE, text.encode())


def read_manifest(directory: str | Path) -> ChatManifest:
    """Read ``chat.json`` and check that the files it names are there, whole.

    Raises:
        UserError: no such directory or manifest, another version's, or a file of another size.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} has no {MANIFEST_FILE}: not a set of dialogues, or its preparation was "
            "interrupted; run the same megatron-k2 data chat command again"
        )
    manifest = _parse(path)
    for split in manifest.splits.values():
        for name, size in split.file_bytes.items():
            _check_size(directory / name, size)
    return manifest


def _parse(path: Path) -> ChatManifest:
    try:
        found = json.loads(path.read_bytes())
        version = found["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema_version {version!r}, expected {SCHEMA_VERSION}; prepare the set "
                "with this version of megatron_k2"
            )
        return ChatManifest(
            tokenizer=TokenizerRecord(**found.pop("tokenizer")),
            splits={name: SplitRecord(**split) for name, split in found.pop("splits").items()},
            packing=PackingRecord(**found.pop("packing")),
            source=SourceRecord(**found.pop("source")),
            **found,
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a set's manifest ({error}); prepare again") from None


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the set again")
    if (actual := path.stat().st_size) != expected:
        raise UserError(f"{path} has {actual:,} bytes, expected {expected:,}; prepare it again")
