"""Files of an import: what goes into which ``.distcp``, and writing one, row chunk by row chunk.

Rows that keep their dtype pass from the mapped source to the file as they lie; FP8 is dequantised
on the way. A worker's memory is a few chunks.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.checkpoint.block_fp8.convert import dequantized
from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX, block_rows
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.hf.rotary_rows import in_pairs
from megatron_k2.checkpoint.hf.writer import row_chunks
from megatron_k2.checkpoint.names.mapping import Pair
from megatron_k2.checkpoint.names.megatron_keys import TransformerImpl
from megatron_k2.checkpoint.stream.jobs import Job, Receipt, naming_the_file
from megatron_k2.checkpoint.stream.output_file import OutputFile
from megatron_k2.checkpoint.stream.rows import Dtype, Rows, promoted
from megatron_k2.checkpoint.torch_dist.writer import (
    Destination,
    WrittenChunk,
    destination_of,
    write_chunk,
)
from megatron_k2.errors import UserError
from megatron_k2.run.iterations import RELEASE

JOB_BYTES = 2**30
"""Of a file, unless one tensor is larger: what a kill costs, and a step of the progress."""


@dataclass(frozen=True)
class ImportInputs:
    """What every worker is told."""

    hf_dir: Path
    check_finite: bool
    fingerprint: str
    """Of the conversion, so that a cached source is never another's."""


def find_destinations(
    source: HfSource,
    pairs: Iterable[Pair],
    num_experts: int,
    dtype: Dtype | None,
    modules: TransformerImpl,
) -> list[Destination]:
    """Every Megatron tensor with its destination; one dtype for all experts of a stored key.

    Args:
        source: what the weights are read from.
        pairs: those that are written.
        num_experts: of a layer.
        dtype: of the weights; None keeps each tensor's, and makes FP8 bf16.
        modules: whose names and places.
    """
    found = [
        destination_of(pair, num_experts, _dtype_of(source, pair, dtype), modules)
        for pair in pairs
        if not pair.rule.is_copy
    ]
    widest: dict[str, Dtype] = {}
    for destination in found:
        before = widest.get(destination.key, destination.dtype)
        widest[destination.key] = promoted((before, destination.dtype))
    return [dataclasses.replace(p, dtype=widest[p.key]) for p in found]


def _dtype_of(source: HfSource, pair: Pair, dtype: Dtype | None) -> Dtype:
    if pair.rule.is_fp32:
        return Dtype.FP32
    if dtype is not None:
        return dtype
    stored = (source.stored[name].dtype for name in pair.hf)
    return promoted(Dtype.BF16 if found is Dtype.E4M3 else found for found in stored)


def file_jobs(destinations: Iterable[Destination]) -> Iterator[Job]:
    """One job a file of at most ``JOB_BYTES``; no file crosses a layer."""
    group: list[Destination] = []
    num_bytes, num_files = 0, 0
    for destination in destinations:
        size = destination.pair.num_elements * destination.dtype.itemsize
        crosses = bool(group) and group[-1].pair.layer != destination.pair.layer
        if group and (crosses or num_bytes + size > JOB_BYTES):
            yield Job(f"{RELEASE}/__{num_files}_0.distcp", num_bytes, tuple(group))
            group, num_bytes, num_files = [], 0, num_files + 1
        group.append(destination)
        num_bytes += size
    yield Job(f"{RELEASE}/__{num_files}_0.distcp", num_bytes, tuple(group))


@functools.lru_cache(maxsize=1)
def _opened(inputs: ImportInputs) -> HfSource:
    """Once in a worker's life: K2's headers are 20 MB of JSON."""
    source = HfSource(inputs.hf_dir)
    in_pairs(source)
    return source


def close_sources() -> None:
    """Unmap what this process has read; workers inherit it otherwise, and deleted files stay."""
    _opened.cache_clear()


def write_file(inputs: ImportInputs, file: OutputFile, job: Job) -> Receipt:
    """Fill one ``.distcp`` file; its receipt lists the chunks."""
    source = _opened(inputs)
    chunks: list[WrittenChunk] = []
    classes: Counter[str] = Counter()
    for destination in job.payload:
        for name, shape, begin in destination.pair.parts():
            with naming_the_file(Path(file.name), name):
                for top, rows in _rows(inputs, source, name, shape, destination.dtype, classes):
                    chunks.append(write_chunk(file, destination, begin + top, rows))
    return {
        "chunks": [dataclasses.astuple(chunk) for chunk in chunks],
        "scale_classes": {str(kind): number for kind, number in classes.items()},
    }


def _rows(
    inputs: ImportInputs,
    source: HfSource,
    name: str,
    shape: tuple[int, ...],
    dtype: Dtype,
    classes: Counter[str],
) -> Iterator[tuple[int, Rows]]:
    """Row chunks of a source tensor in ``dtype``, FP8 dequantised; first row and rows."""
    stored = source.stored[name].dtype
    is_computed = stored is not dtype or inputs.check_finite
    for top, end in row_chunks(shape, dtype.itemsize):
        rows = source.read(name, slice(top, end), is_computed=is_computed)
        if stored is Dtype.E4M3:
            scales = source.read(name + SCALE_SUFFIX, block_rows(top, end), is_computed=True)
            rows, found = dequantized(rows, scales, dtype)
            classes.update(found)
        rows = rows.to(dtype)
        if inputs.check_finite:
            _require_finite(source, name, top, rows)
        yield top, rows


def _require_finite(source: HfSource, name: str, top: int, rows: Rows) -> None:
    if (bad := rows.first_not_finite()) is not None:
        file = source.directory / source.stored[name].file
        raise UserError(f"{file}: '{name}' has a NaN or an infinity in row {top + bad}")
