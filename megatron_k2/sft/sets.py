"""The packs that ``--sft-data`` names: one chat set, or a blend of several and pretraining text."""

from collections.abc import Sequence
from pathlib import Path

from megatron_k2.data.manifest import MANIFEST_FILE as TEXT_MANIFEST
from megatron_k2.data.manifest import TokenizerRecord
from megatron_k2.data.manifest import read_manifest as read_text_manifest
from megatron_k2.errors import UserError
from megatron_k2.sft.blend import Blend
from megatron_k2.sft.manifest import MANIFEST_FILE, read_manifest
from megatron_k2.sft.packed_set import PackedSet, PretrainText, Sequences


def row_multiple(cp_size: int) -> int:
    """Of which a document's rows are a multiple: two chunks for each context-parallel rank."""
    return 1 if cp_size == 1 else 2 * cp_size


def weighted_directories(words: Sequence[str]) -> list[tuple[float, Path]]:
    """``DIR`` or ``WEIGHT DIR WEIGHT DIR ...`` as (weight, directory).

    Raises:
        UserError: where a weight is missing or no number.
    """
    if len(words) == 1:
        return [(1.0, Path(words[0]))]
    if len(words) % 2 or not words:
        raise UserError(
            f"--sft-data {' '.join(words)}: one directory is expected, or weights and directories, "
            "alternating"
        )
    found = []
    for weight, directory in zip(words[::2], words[1::2], strict=True):
        try:
            found.append((float(weight), Path(directory)))
        except ValueError:
            raise UserError(
                f"--sft-data: {weight!r} is no weight; weights and directories alternate"
            ) from None
    return found


def open_set(directory: Path, split: str, *, capacity: int, multiple: int) -> Sequences:
    """A chat set, or pretraining text where the directory holds that.

    Args:
        directory: of ``data chat`` or ``data prepare``.
        split: ``train`` or ``valid``.
        capacity: rows of a pack.
        multiple: ``row_multiple``.

    Raises:
        UserError: where it holds neither, or not this split.
    """
    is_text = not (directory / MANIFEST_FILE).exists() and (directory / TEXT_MANIFEST).exists()
    kind = PretrainText if is_text else PackedSet
    return kind(directory, split, capacity=capacity, multiple=multiple)


def tokenizer_of(directory: Path) -> TokenizerRecord | None:
    """Of a set of either kind; ``None`` where there is none.

    Raises:
        UserError: for one that is not whole.
    """
    if (directory / MANIFEST_FILE).exists():
        return read_manifest(directory).tokenizer
    if (directory / TEXT_MANIFEST).exists():
        return read_text_manifest(directory).tokenizer
    return None


def has_split(directory: Path, split: str) -> bool:
    """Whether a set of either kind has a split."""
    if (directory / MANIFEST_FILE).exists():
        return split in read_manifest(directory).splits
    return split in read_text_manifest(directory).splits


def open_packs(
    words: Sequence[str], split: str, number: int, seed: int, *, capacity: int, multiple: int
) -> Blend | None:
    """``number`` packs in the order in which they are drawn; ``None`` where no set has the split.

    Args:
        words: of ``--sft-data``.
        split: ``train`` or ``valid``; each set has the first.
        number: over all epochs.
        seed: of the shuffles.
        capacity: rows of a pack.
        multiple: ``row_multiple``.
    """
    found = [
        (weight, open_set(directory, split, capacity=capacity, multiple=multiple))
        for weight, directory in weighted_directories(words)
        if split == "train" or has_split(directory, split)
    ]
    return Blend(found, number, seed) if found else None
