"""What a run reads: indexed datasets and their parts of the tokens, as frozen data.

A phase is a recipe, so another phase may have another blend; nothing of one reaches the next, which
counts its samples from zero.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.data.manifest import MANIFEST_FILE, DataManifest, read_manifest
from megatron_k2.errors import UserError
from megatron_k2.flags.data import read_blend
from megatron_k2.flags.megatron import check_vocabulary
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class DataBlend:
    """Indexed datasets with their weights; without any, Megatron's mock data."""

    root: str
    """Directory that the prefixes are relative to."""
    weights: tuple[float, ...] = ()
    """A prefix's part of the tokens; Megatron divides by their sum."""
    prefixes: tuple[str, ...] = ()
    """Below ``root``: of ``PREFIX.bin`` and ``PREFIX.idx``, or a directory made by
    ``megatron-k2 data prepare``, whose training split is read."""
    file: str = ""
    """In place of prefixes and weights: a JSON file of Megatron's ``--per-split-data-args-path``,
    ``{"train": "0.7 a 0.3 b", "valid": …, "test": …}``, a list in place of a text allowed."""
    is_synthetic: bool = False
    """A small corpus is made at every prefix that is absent (``data/synthetic.py``)."""

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.prefixes):
            raise UserError(
                f"data: {len(self.weights)} weights for {len(self.prefixes)} prefixes; give one "
                "each, --set data.weights=… --set data.prefixes=…"
            )
        if wrong := [w for w in self.weights if not (w > 0 and math.isfinite(w))]:
            raise UserError(
                f"data.weights: {wrong[0]:g} is not a weight; a number above 0 is "
                "expected, and a prefix that is not to be read is left out"
            )
        if twice := {p for p in self.prefixes if self.prefixes.count(p) > 1}:
            raise UserError(
                f"data.prefixes: '{min(twice)}' is named twice; once, with the sum of its weights"
            )

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """(prefix, its part of the tokens, from 0 to 1)."""
        total = sum(self.weights)
        return tuple((p, w / total) for p, w in zip(self.prefixes, self.weights, strict=True))

    def flags(self, preset: ModelPreset) -> list[str]:
        """Megatron's; ids are ready-made, so no tokenizer is loaded.

        Raises:
            UserError: for a file or a prepared directory that is here and cannot be used.
        """
        if not (self.file or self.prefixes):
            return ["--mock-data"]
        manifests: list[DataManifest] = []
        if self.file:
            if Path(self.file).is_file():  # on a cluster perhaps; its ranks look again
                read_blend(Path(self.file))
            flags = ["--per-split-data-args-path", self.file]
        else:
            flags = ["--train-data-path"]
            for weight, prefix in zip(self.weights, self.prefixes, strict=True):
                flags += [f"{weight:g}", self._path(prefix, preset, manifests)]
        if len({manifest.tokenizer.identity for manifest in manifests}) > 1:
            raise UserError(
                f"data.prefixes: datasets below {self.root} were made with different tokenizers; "
                "prepare them with one"
            )
        eod = manifests[0].tokenizer.eod_id if manifests else preset.eos_token_id
        flags += ["--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id", str(eod)]
        return [*flags, *(["--synthetic-data"] if self.is_synthetic else [])]

    def _path(self, prefix: str, preset: ModelPreset, manifests: list[DataManifest]) -> str:
        """Where Megatron finds ``prefix``; of a prepared directory, its training split."""
        path = Path(self.root) / prefix
        if not (path / MANIFEST_FILE).is_file():
            return f"{self.root}/{prefix}"
        manifest = read_manifest(path)
        check_vocabulary(manifest.tokenizer, preset.vocab_size, preset.name)
        manifests.append(manifest)
        return str(path / manifest.splits["train"].prefix)

    def described(self) -> str:
        """The blend in one line of the launch table: parts, then where the files are."""
        if self.file:
            return self.file
        if not self.prefixes:
            return "Megatron's mock data"
        parts = ", ".join(f"{prefix} {part:.0%}" for prefix, part in self.parts)
        return f"{parts}; {self.root}" + (" (made there)" if self.is_synthetic else "")
