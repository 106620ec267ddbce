"""Megatron checkpoint -> Hugging Face directory, streaming, whole or not at all.

Order of work: open the checkpoint, settle the shape, audit every key, then write shard after shard
into ``<directory>.partial`` beside the target, and rename when everything is on the disk. A killed
export leaves no target; its partial directory is removed by the next attempt.

One layer is one shard, ``model-{i}-of-{n}.safetensors``, i from 1 without padding, as in K2's
release: embedding with layer 0, norm and head with the last.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_k2 import __version__
from megatron_k2.checkpoint.audit import require_clean
from megatron_k2.checkpoint.hf_config import (
    generation_config,
    hf_config,
    preset_from_args,
    without_yarn,
)
from megatron_k2.checkpoint.mapping import Pair, expand
from megatron_k2.checkpoint.megatron_source import MegatronSource, find_iteration
from megatron_k2.checkpoint.model_card import model_card
from megatron_k2.checkpoint.safetensors_stream import TensorSlot, write_safetensors
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset, get_preset

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tiktoken.model",
    "tokenization_kimi.py",
)

Progress = Callable[[int, int], None]
"""Called after every shard with (shards written, shards in all)."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What a person may choose; None: take it from the checkpoint's saved arguments."""

    preset: str | None = None
    iteration: int | None = None
    dtype: str = "bf16"
    model_type: str = "kimi_k2"
    use_yarn: bool | None = None
    tokenizer: Path | None = None


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written."""

    directory: Path
    preset: ModelPreset
    num_tensors: int
    num_shards: int
    total_size_bytes: int


def settle_preset(saved: Any, name: str | None, use_yarn: bool | None) -> ModelPreset:
    """The shape of the checkpoint: the preset, changed by the run's flags where it saved them.

    Args:
        saved: Megatron's ``args`` of the run, or None.
        name: the preset's name, or None to take ``args.preset``.
        use_yarn: whether the position encoding is YaRN's; None to take ``args.rope_type``.

    Raises:
        UserError: if name or YaRN are in neither place.
    """
    name = name or getattr(saved, "preset", None)
    if name is None:
        raise UserError("the checkpoint saved no preset name; give one with --preset")
    base = get_preset(name)
    preset = base if saved is None else preset_from_args(saved, base)
    if use_yarn is False:
        return without_yarn(preset)
    if use_yarn is None and getattr(saved, "rope_type", None) is None and base.yarn is not None:
        raise UserError(
            f"preset '{name}' can be trained with and without YaRN and the checkpoint does not "
            "say which; give --yarn or --no-yarn"
        )
    if use_yarn and preset.yarn is None:
        if base.yarn is None:
            raise UserError(f"--yarn: preset '{name}' has no YaRN parameters")
        return dataclasses.replace(
            preset, yarn=base.yarn, max_position_embeddings=base.max_position_embeddings
        )
    return preset


def export(
    megatron_dir: Path,
    hf_dir: Path,
    options: ExportOptions,
    progress: Progress = lambda done, total: None,
) -> ExportResult:
    """Write ``hf_dir`` from the checkpoint in ``megatron_dir``.

    Args:
        megatron_dir: Megatron's ``--save`` directory, or one ``iter_*`` inside it.
        hf_dir: must not exist yet, or be empty.
        options: choices that the checkpoint does not answer, or that shall differ from it.
        progress: told after every shard.

    Raises:
        UserError: before anything is written, for every wrong input that can be seen then.
    """
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype '{options.dtype}' is not one of: {', '.join(DTYPES)}")
    _require_free(hf_dir)
    tokenizer_files = _tokenizer_files(options.tokenizer)
    source = MegatronSource(find_iteration(megatron_dir, options.iteration))
    preset = settle_preset(source.args, options.preset, options.use_yarn)
    config = hf_config(preset, model_type=options.model_type, dtype=options.dtype)
    require_clean(source.shapes, preset)

    partial = hf_dir.with_name(f"{hf_dir.name}.partial")
    if partial.exists():
        logger.warning("removing %s, left by an export that did not finish", partial)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    weight_map, total_bytes = _write_shards(partial, source, preset, options.dtype, progress)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(partial / "model.safetensors.index.json", index)
    _write_json(partial / "config.json", config)
    _write_json(partial / "generation_config.json", generation_config(preset))
    _write_text(partial / "README.md", _card(source, preset, options))
    for path in tokenizer_files:
        shutil.copy2(path, partial / path.name)
    _publish(partial, hf_dir)
    return ExportResult(hf_dir, preset, len(weight_map), preset.num_layers, total_bytes)


def _require_free(hf_dir: Path) -> None:
    if hf_dir.exists() and (not hf_dir.is_dir() or any(hf_dir.iterdir())):
        raise UserError(f"{hf_dir} exists already; remove it or choose another directory")


def _tokenizer_files(tokenizer: Path | None) -> list[Path]:
    if tokenizer is None:
        return []
    found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not found:
        raise UserError(f"--tokenizer {tokenizer} has none of: {', '.join(TOKENIZER_FILES)}")
    return found


def _slots(pair: Pair, dtype: torch.dtype) -> list[TensorSlot]:
    kept = torch.float32 if pair.rule.is_fp32 else dtype
    return [
        TensorSlot(name, shape, kept) for name, shape in zip(pair.hf, pair.hf_shapes, strict=True)
    ]


def _tensors(source: MegatronSource, pairs: list[Pair]) -> Iterator[Tensor]:
    for pair in pairs:
        rows = slice(0, pair.megatron_shape[0])
        yield from pair.rule.operation.split(source.read(pair.megatron, rows))


def _write_shards(
    directory: Path, source: MegatronSource, preset: ModelPreset, dtype: str, progress: Progress
) -> tuple[dict[str, str], int]:
    """All shards; returns the index's ``weight_map`` and ``total_size`` in bytes."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for layer, group in groupby(expand(preset), key=lambda pair: pair.layer):
        # fp32 first, so that every tensor is aligned to its element size
        pairs = sorted(group, key=lambda pair: not pair.rule.is_fp32)
        slots = [slot for pair in pairs for slot in _slots(pair, DTYPES[dtype])]
        name = f"model-{layer + 1}-of-{preset.num_layers}.safetensors"
        total_bytes += write_safetensors(directory / name, slots, _tensors(source, pairs))
        weight_map |= {slot.name: name for slot in slots}
        progress(layer + 1, preset.num_layers)
    return dict(sorted(weight_map.items())), total_bytes


def _card(source: MegatronSource, preset: ModelPreset, options: ExportOptions) -> str:
    samples = getattr(source.args, "consumed_train_samples", None)
    seq_length = getattr(source.args, "seq_length", None)
    return model_card(
        preset,
        checkpoint=source.directory.name,
        iteration=source.common.get("iteration"),
        num_tokens=samples * seq_length if samples is not None and seq_length else None,
        dtype=options.dtype,
        model_type=options.model_type,
        versions={
            "megatron-k2": __version__,
            "megatron-core": importlib.metadata.version("megatron-core"),
            "torch": torch.__version__,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, target: Path) -> None:
    """Rename; an empty target is replaced, which ``rename`` does on POSIX."""
    partial.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
