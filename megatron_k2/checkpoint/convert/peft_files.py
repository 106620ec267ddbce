"""PEFT's directory of an adapter, written from a Megatron checkpoint and read into one.

An adapter is thousands of times smaller than its model: it is held whole, and written in one go,
under a temporary name until everything is on the disk.
"""

import dataclasses
import io
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.hf.reader import read_json
from megatron_k2.checkpoint.lora.adapters import AdapterSource
from megatron_k2.checkpoint.lora.peft_format import CONFIG, WEIGHTS, peft_config, peft_tensors
from megatron_k2.checkpoint.lora.peft_import import Imported, megatron_adapters
from megatron_k2.checkpoint.names.mapping import Pair, expand
from megatron_k2.checkpoint.names.megatron_keys import STACKED_EXPERTS
from megatron_k2.checkpoint.run_config import settle_preset
from megatron_k2.checkpoint.stream.jobs import JobDirectory, require_free_or_finished
from megatron_k2.checkpoint.stream.rows import Rows, rows_of
from megatron_k2.checkpoint.torch_dist import archive
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.checkpoint.torch_dist.writer import WrittenChunk, write_common, write_metadata
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.run.iterations import RELEASE, find_iteration, point_tracker
from megatron_k2.run.record import RUN_RECORD, write_record

_APART = "mlp.experts.local_experts."


@dataclasses.dataclass(frozen=True)
class PeftResult:
    """What was written, for the line that the command prints."""

    directory: Path
    num_tensors: int
    rank: int
    alpha: float
    left_out: tuple[str, ...]
    """Adapters of layers that transformers does not have."""


def is_peft(directory: Path) -> bool:
    """Whether ``directory`` is an adapter of PEFT's."""
    return (directory / CONFIG).is_file()


def pairs_of(base: MegatronSource, preset: str | None) -> list[Pair]:
    """Every weight of the base."""
    return list(expand(settle_preset(base.args, preset, None)))


def export_peft(adapters: AdapterSource, peft_dir: Path, preset: str | None) -> PeftResult:
    """Write ``peft_dir``, which must not exist yet or be empty.

    Args:
        adapters: opened.
        peft_dir: to create.
        preset: where the base saved no arguments.
    """
    from safetensors.torch import save

    require_free_or_finished(peft_dir)
    shape = settle_preset(MegatronSource(adapters.base_directory).args, preset, None)
    every = list(expand(shape))
    pairs = [pair for pair in every if pair.layer < shape.num_layers]
    lost = [
        pair.megatron for pair in every if pair.layer >= shape.num_layers and adapters.has(pair)
    ]
    adapters.require_matched(every)
    tensors = peft_tensors(adapters, pairs)
    config = peft_config(adapters, pairs)
    job = _job(peft_dir, adapters.source.directory / ".metadata", config)
    write_atomically(job.directory / WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomically(job.directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    job.publish()
    return PeftResult(peft_dir, len(tensors), adapters.rank, adapters.alpha, tuple(lost))


def import_peft(peft_dir: Path, megatron_dir: Path, base: Path, preset: str | None) -> PeftResult:
    """Write a Megatron checkpoint of adapters that a run goes on from.

    Args:
        peft_dir: ``adapter_config.json`` and ``adapter_model.safetensors``.
        megatron_dir: to create; what is given to ``--load`` with ``--lora-rank``.
        base: the run or checkpoint of the model they belong to.
        preset: where the base saved no arguments.
    """
    from safetensors.torch import load_file

    require_free_or_finished(megatron_dir)
    if not (peft_dir / WEIGHTS).is_file():
        raise UserError(f"{peft_dir} has no {WEIGHTS}; expected a directory of PEFT's")
    directory = find_iteration(base)
    source = MegatronSource(directory)
    pairs = pairs_of(source, preset)
    config = read_json(peft_dir / CONFIG)
    imported = megatron_adapters(load_file(peft_dir / WEIGHTS), config, pairs)
    args: Any = source.args
    saved = Namespace(**vars(args)) if args is not None else Namespace(preset=preset)
    lora = {"lora_rank": imported.rank, "lora_alpha": imported.alpha, "lora_dropout": 0.0}
    vars(saved).update(lora, lora_targets=_targets(imported), lora_base=str(directory.absolute()))
    job = _job(megatron_dir, peft_dir / WEIGHTS, config | {"base": str(directory)})
    _write_checkpoint(job.directory / RELEASE, imported, saved)
    point_tracker(job.directory, RELEASE)
    record = {"preset": getattr(saved, "preset", preset), "flags": _flags(saved)}
    write_record(job.directory / RUN_RECORD, record)
    job.publish()
    return PeftResult(megatron_dir, len(imported.tensors), imported.rank, imported.alpha, ())


def _job(target: Path, source: Path, options: dict[str, Any]) -> JobDirectory:
    stat = source.stat()
    record = {"source": [str(source.resolve()), stat.st_size, stat.st_mtime_ns], **options}
    return JobDirectory(target, record, stat.st_size)


def _flags(saved: Namespace) -> list[str]:
    """What a start reads of the record: that these are adapters, and over what."""
    return [
        *("--lora-rank", str(saved.lora_rank), "--lora-alpha", str(saved.lora_alpha)),
        *("--lora-targets", *saved.lora_targets, "--lora-base", saved.lora_base),
    ]


def _targets(imported: Imported) -> list[str]:
    """Which of ``--lora-targets`` have an adapter."""
    found: set[str] = set()
    for name in imported.tensors:
        words = name.split(".")
        linear = words[words.index("adapter") - 1]
        if linear in ("linear_fc1", "linear_fc2"):
            place = next((p for p in ("experts", "shared_experts") if p in words), "mlp")
            linear = f"{place}.{linear}"
        found.add(linear)
    return sorted(found)


def _write_checkpoint(directory: Path, imported: Imported, args: Namespace) -> None:
    """One file; a layer's routed experts are one stored tensor, as Megatron keeps them."""
    directory.mkdir(parents=True, exist_ok=True)
    file = "__0_0.distcp"
    content = io.BytesIO()
    placed = [(_place(name), tensor) for name, tensor in imported.tensors.items()]
    num_stacked = Counter(key for (key, leading), _ in placed if leading)
    chunks: list[tuple[str, WrittenChunk]] = []
    for (key, leading), tensor in placed:
        rows = rows_of(tensor)
        lengths = (*(1 for _ in leading), *rows.shape)
        size = (*([num_stacked[key]] if leading else []), *rows.shape)
        at = archive.write_tensor(content, Rows(rows.bits.reshape(lengths), rows.dtype))
        offsets = (*leading, *(0 for _ in rows.shape))
        chunk = WrittenChunk(key, size, rows.dtype.torch_name, offsets, lengths, *at)
        chunks.append((file, chunk))
    write_atomically(directory / file, content.getvalue())
    write_metadata(directory, chunks, write_common(directory, "__1_0.distcp", args))


def _place(name: str) -> tuple[str, tuple[int, ...]]:
    """The stored key of a tensor of the model, and its index where experts are stacked."""
    prefix, is_expert, rest = name.partition(_APART)
    prefix = prefix.replace(".mtp_model_layer.", ".transformer_layer.")
    if not is_expert:
        return prefix, ()
    index, _, matrix = rest.partition(".")
    return f"{prefix}{STACKED_EXPERTS}{matrix}", (int(index),)
