"""Shards of an export: what goes into which file, and writing one, row chunk by row chunk.

Memory of a worker is a few chunks: weights are views of the mapped checkpoint until they are
converted, and a safetensors header is written before its data, from names and shapes alone. Only
the scales of a shard's FP8 weights are held until their turn; they are 1/4096 of the codes.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_k2.checkpoint.block_fp8.convert import requantized
from megatron_k2.checkpoint.block_fp8.layout import (
    SCALE_SUFFIX,
    block_rows,
    scale_shape,
)
from megatron_k2.checkpoint.hf.quantization import BlockFp8
from megatron_k2.checkpoint.hf.reader import HfSource, HfTensor
from megatron_k2.checkpoint.hf.writer import (
    TensorSlot,
    row_chunks,
    write_header,
    write_rows,
)
from megatron_k2.checkpoint.lora.adapters import AdapterSource
from megatron_k2.checkpoint.lora.merged import MergedSource, RowSource
from megatron_k2.checkpoint.names.mapping import Pair, expand
from megatron_k2.checkpoint.stream.jobs import Job, Receipt, naming_the_file
from megatron_k2.checkpoint.stream.output_file import OutputFile
from megatron_k2.checkpoint.stream.rows import Dtype, Rows
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset

DTYPES = {"bf16": Dtype.BF16, "fp32": Dtype.FP32, "fp8": Dtype.BF16}
"""``--dtype`` -> dtype of what is not FP8."""


@dataclass(frozen=True)
class ExportInputs:
    """What every worker is told."""

    checkpoint: Path
    check_finite: bool
    scales: Path | None
    """Of the source release, to give untouched blocks their codes back; may be absent."""
    power_of_two: bool
    """Scales made anew are powers of two."""
    fingerprint: str
    """Of the job, so that a cached source is never another's."""
    adapters: Path | None = None
    """A checkpoint of adapters to merge in."""
    preset: ModelPreset | None = None
    """Of the model; says which weights the adapters belong to."""


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor: a run of rows of a Megatron tensor."""

    slot: TensorSlot
    megatron: str
    first_row: int


def pieces_of(pair: Pair, dtype: Dtype, fp8: BlockFp8 | None) -> Iterator[Piece]:
    """The Hugging Face tensors of a Megatron tensor."""
    for name, shape, begin in pair.parts():
        kept = Dtype.FP32 if pair.rule.is_fp32 else dtype
        stored = Dtype.E4M3 if fp8 is not None and fp8.quantizes(name) else kept
        yield Piece(TensorSlot(name, shape, stored), pair.megatron, begin)


def plan_shards(
    pairs: Iterable[Pair],
    num_layers: int,
    dtype: Dtype,
    fp8: BlockFp8 | None,
    max_shard_bytes: int | None,
) -> list[Job]:
    """Files and what is in each.

    Args:
        pairs: in layer order.
        num_layers: of the model; n in ``model-i-of-n``, also where ``--only`` leaves layers out.
        dtype: of what is not FP8.
        fp8: which weights are FP8; None for none.
        max_shard_bytes: None for one layer a shard; else files are filled up to this, and named
            ``model-00001-of-000NN`` as transformers does.
    """
    if max_shard_bytes is None:
        return [
            _job(
                f"model-{layer + 1}-of-{num_layers}.safetensors",
                [piece for pair in group for piece in pieces_of(pair, dtype, fp8)],
            )
            for layer, group in itertools.groupby(pairs, key=lambda pair: pair.layer)
        ]
    groups: list[list[Piece]] = [[]]
    num_bytes = 0
    for piece in (piece for pair in pairs for piece in pieces_of(pair, dtype, fp8)):
        size = _size(piece)
        if groups[-1] and num_bytes + size > max_shard_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(piece)
        num_bytes += size
    return [
        _job(f"model-{i:05}-of-{len(groups):05}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def _size(piece: Piece) -> int:
    scales = scale_slot(piece.slot)
    return piece.slot.num_bytes + (scales.num_bytes if scales else 0)


def _job(file: str, pieces: list[Piece]) -> Job:
    # fp32 first and FP8 last, so that every tensor is aligned to its element size
    order = sorted(pieces, key=lambda piece: -piece.slot.dtype.itemsize)
    return Job(file, sum(map(_size, pieces)), tuple(order))


def scale_slot(slot: TensorSlot) -> TensorSlot | None:
    """The scales that go with an FP8 weight."""
    if slot.dtype is not Dtype.E4M3:
        return None
    return TensorSlot(slot.name + SCALE_SUFFIX, scale_shape(slot.shape), Dtype.FP32)


class _Scales:
    """The source release's scales, if it was FP8."""

    def __init__(self, path: Path | None) -> None:
        self._stored: dict[str, HfTensor] = {}
        if path is not None and path.is_file():
            self._source = HfSource(path.parent, files=[path.name])
            self._stored = self._source.stored

    def rows(self, name: str, shape: tuple[int, ...], blocks: slice) -> Rows | None:
        """Scales of a weight's rows of blocks; None if its source was not block FP8."""
        stored = self._stored.get(name + SCALE_SUFFIX)
        if stored is None or stored.shape != scale_shape(shape):
            return None
        return self._source.read(name + SCALE_SUFFIX, blocks, is_computed=True)


@functools.lru_cache(maxsize=1)
def _opened(inputs: ExportInputs) -> tuple[RowSource, _Scales]:
    """Once in a worker's life."""
    source = MegatronSource(inputs.checkpoint)
    if inputs.adapters is None or inputs.preset is None:
        return source, _Scales(inputs.scales)
    adapters = AdapterSource(MegatronSource(inputs.adapters), inputs.checkpoint)
    return MergedSource(source, adapters, list(expand(inputs.preset))), _Scales(inputs.scales)


def close_sources() -> None:
    """Unmap what this process has read; workers inherit it otherwise, and deleted files stay."""
    _opened.cache_clear()


def write_shard(inputs: ExportInputs, file: OutputFile, job: Job) -> Receipt:
    """Fill one safetensors file; its receipt has the names for the index."""
    source, scales = _opened(inputs)
    slots = [piece.slot for piece in job.payload]
    scale_slots = [slot for weight in slots if (slot := scale_slot(weight))]
    every = [*scale_slots, *slots]
    blocks: Counter[str] = Counter()
    # Before anything large: a small tensor made now and then, and kept, would keep the allocator
    # from reusing what large ones leave between them.
    made = {slot.name: np.empty(slot.shape, np.float32) for slot in scale_slots}
    write_header(file, every)
    scales_at = file.tell()
    file.seek(sum(slot.num_bytes for slot in scale_slots), 1)  # filled in as codes are made
    for piece in job.payload:
        with naming_the_file(Path(file.name), piece.slot.name):
            for rows in _rows(inputs, source, scales, piece, made, blocks):
                write_rows(file, rows)
    file.seek(scales_at)
    for slot in scale_slots:
        write_rows(file, Rows(made[slot.name], slot.dtype))
    return {
        "names": [slot.name for slot in every],
        "tensor_bytes": sum(slot.num_bytes for slot in every),
        "blocks": dict(blocks),
    }


def _rows(
    inputs: ExportInputs,
    source: RowSource,
    scales: _Scales,
    piece: Piece,
    made: dict[str, np.ndarray],
    blocks: Counter[str],
) -> Iterator[Rows]:
    """One tensor's rows as they are stored; its scales, if it is FP8, go to ``made``."""
    slot = piece.slot
    is_computed = slot.dtype is not source.dtype(piece.megatron) or inputs.check_finite
    for top, end in row_chunks(slot.shape, 4):
        of_source = slice(piece.first_row + top, piece.first_row + end)
        rows = source.read(piece.megatron, of_source, is_computed=is_computed)
        if inputs.check_finite:
            _require_finite(source, piece, top, rows)
        if slot.dtype is Dtype.E4M3:
            at = block_rows(top, end)
            known = scales.rows(slot.name, slot.shape, at)
            rows, fresh, num_kept = requantized(rows, known, power_of_two=inputs.power_of_two)
            made[slot.name + SCALE_SUFFIX][at] = fresh
            blocks.update(kept=num_kept, fresh=fresh.size - num_kept)
        yield rows.to(slot.dtype)


def _require_finite(source: RowSource, piece: Piece, top: int, rows: Rows) -> None:
    if (bad := rows.first_not_finite()) is not None:
        row = piece.first_row + top + bad
        raise UserError(
            f"{source.directory}: '{piece.megatron}' has a NaN or an infinity in row {row}"
        )
