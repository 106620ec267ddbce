"""What a fine-tuning run reads: chat sets and their shares of the packs, as frozen data."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import SFT_DATA, check_vocabulary
from megatron_k2.presets import ModelPreset
from megatron_k2.sft.sets import tokenizer_of


@dataclass(frozen=True)
class ChatBlend:
    """Directories of ``megatron-k2 data chat``, or of ``data prepare`` for pretraining text."""

    root: str
    """Directory that the sets are relative to."""
    weights: tuple[float, ...]
    """A set's share of the packs, as a relative number."""
    sets: tuple[str, ...]
    """Below ``root``."""
    is_synthetic: bool = False
    """A small set is made in every directory that is absent (``sft/synthetic.py``)."""

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.sets) or not self.sets:
            raise UserError(
                f"data: {len(self.weights)} weights for {len(self.sets)} sets; give one each, "
                "--set data.weights=… --set data.sets=…"
            )
        if wrong := [w for w in self.weights if not (w > 0 and math.isfinite(w))]:
            raise UserError(
                f"data.weights: {wrong[0]:g} is not a weight; a number above 0 is expected, and a "
                "set that is not to be read is left out"
            )

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """(set, its share of the packs, from 0 to 1)."""
        total = sum(self.weights)
        return tuple((name, w / total) for name, w in zip(self.sets, self.weights, strict=True))

    def flags(self, preset: ModelPreset) -> list[str]:
        """Ours, and Megatron's for ids that are ready-made.

        Raises:
            UserError: for a set that is here and cannot be used.
        """
        words, eod = [], preset.eos_token_id
        for weight, name in zip(self.weights, self.sets, strict=True):
            directory = Path(self.root) / name
            words += [f"{weight:g}", f"{self.root}/{name}"]
            if directory.is_dir() and (tokenizer := tokenizer_of(directory)) is not None:
                check_vocabulary(tokenizer, preset.vocab_size, preset.name)
                eod = tokenizer.eod_id
        flags = [SFT_DATA, *(words if len(self.sets) > 1 else words[1:])]
        flags += ["--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id", str(eod)]
        return [*flags, *(["--synthetic-data"] if self.is_synthetic else [])]

    def described(self) -> str:
        """The blend in one line of the launch table: shares, then where the sets are."""
        parts = ", ".join(f"{name} {part:.0%}" for name, part in self.parts)
        return f"{parts}; {self.root}" + (" (made there)" if self.is_synthetic else "")
