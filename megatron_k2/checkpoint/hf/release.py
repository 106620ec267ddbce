"""A release opened for conversion: its tensors, its shape, and what of it is left out."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.checkpoint.hf.language_model import listed_parts
from megatron_k2.checkpoint.hf.packed_int4 import PACKED, UNPACK_FIRST
from megatron_k2.checkpoint.hf.preset import preset_from_hf
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.hf.rotary_rows import in_pairs
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class Release:
    """A Hugging Face directory and the model that its tensors are of."""

    source: HfSource
    preset: ModelPreset
    notes: tuple[str, ...]
    """What ``config.json`` or the files have that is not taken, a sentence each."""


def open_release(directory: Path, preset_name: str | None = None) -> Release:
    """Open a directory and settle its shape.

    Args:
        directory: of safetensors files with a ``config.json``.
        preset_name: whose name and training defaults the preset has; None: the one of its shape.

    Raises:
        UserError: naming the file, tensor or key that is at fault.
    """
    source = HfSource(directory)
    preset = preset_from_hf(source.config, preset_name)
    _refuse_packed(source)
    preset, notes = _without_absent_predictions(preset, source.stored)
    if source.left_out:
        notes += (f"not of the language model, left out: {listed_parts(source.left_out)}",)
    if in_pairs(source):
        notes += ("rope_interleave is false: rotary rows brought into pairs, an export says true",)
    if source.packed:
        size = next(iter(source.packed.values())).group_size
        notes += (f"{len(source.packed):,} weights in int4, groups of {size}: dequantised",)
    return Release(source, preset, notes)


def _refuse_packed(source: HfSource) -> None:
    """Weights of compressed-tensors where ``config.json`` does not say so."""
    packed = [name for name in source.stored if name.endswith(PACKED)]
    if packed:
        raise UserError(
            f"{source.directory}: '{packed[0]}' and {len(packed) - 1} more are packed integers of "
            f"compressed-tensors, though config.json has no quantization_config that says so; put "
            f"the release's own back, or {UNPACK_FIRST}"
        )


def _without_absent_predictions(
    preset: ModelPreset, names: Iterable[str]
) -> tuple[ModelPreset, tuple[str, ...]]:
    """Leave out prediction layers that ``config.json`` announces and no tensor belongs to.

    transformers passes over them as it loads, and a model it saves says the old number still. Where
    some of their tensors are there, the audit names those that are not.
    """
    layers = range(preset.num_layers, preset.num_layers + preset.num_mtp_layers)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    if not prefixes or any(name.startswith(prefixes) for name in names):
        return preset, ()
    note = (
        f"config.json announces num_nextn_predict_layers={preset.num_mtp_layers}, but no tensor of "
        f"{prefixes[0]}* is there: taken without prediction layers"
    )
    return dataclasses.replace(preset, num_mtp_layers=0), (note,)
