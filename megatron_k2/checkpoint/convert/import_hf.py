"""Hugging Face directory -> Megatron ``torch_dist`` checkpoint, streaming, whole or not at all.

Order of work: open and check the source, settle the shape from its ``config.json``, audit every
tensor, make Megatron's arguments, look at the disk; only then write. Weights pass as row chunks
from mapped files to ``.distcp`` files: no model is built, and a worker's memory is a few chunks.

The result is a ``--save`` directory whose tracker says ``release``: weights without a history.

    OUT/latest_checkpointed_iteration.txt
    OUT/release/      .metadata, *.distcp, arguments
    OUT/hf_source/    config.json, tokenizer files, scales.safetensors: what an export needs to give
                      back the source's fields and, where training left them alone, its FP8 bytes
"""

import dataclasses
import functools
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.block_fp8 import convert as block_fp8
from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX
from megatron_k2.checkpoint.convert.import_files import (
    ImportInputs,
    close_sources,
    file_jobs,
    find_destinations,
    write_file,
)
from megatron_k2.checkpoint.hf.audit import (
    SourceAudit,
    audit_source,
    require_clean_source,
)
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.hf.release import open_release
from megatron_k2.checkpoint.hf.release_files import copy_files, release_files, stats_of
from megatron_k2.checkpoint.hf.writer import TensorSlot, row_chunks, write_safetensors
from megatron_k2.checkpoint.names.mapping import expand
from megatron_k2.checkpoint.names.megatron_keys import TransformerImpl
from megatron_k2.checkpoint.names.selection import Selection
from megatron_k2.checkpoint.stream.jobs import (
    Job,
    JobDirectory,
    Progress,
    Receipt,
    naming_the_file,
    require_free_or_finished,
    require_workers,
    run_jobs,
)
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.checkpoint.torch_dist.imported_args import imported_args
from megatron_k2.checkpoint.torch_dist.source_trail import SCALES_FILE, SOURCE_DIR
from megatron_k2.checkpoint.torch_dist.writer import (
    Destination,
    chunk_from,
    write_common,
    write_metadata,
)
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset
from megatron_k2.run.iterations import RELEASE, point_tracker

DTYPES = {"bf16": Dtype.BF16, "fp32": Dtype.FP32}


@dataclass(frozen=True)
class ImportOptions:
    """What a person may choose."""

    preset: str | None = None
    """Name saved with the checkpoint; None: the preset of the same shape, else kimi-k2."""
    dtype: str | None = None
    """``bf16`` or ``fp32``; None keeps each tensor's, and makes FP8 bf16."""
    only: Selection = dataclasses.field(default_factory=Selection)
    num_workers: int = 1
    check_finite: bool = False
    """Refuse NaN and infinite weights."""
    modules: TransformerImpl = "local"
    """Whose modules the model that loads it is built of; they name and store norms differently."""


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote, for the lines that the command prints."""

    directory: Path
    preset: ModelPreset
    audit: SourceAudit
    num_files: int
    total_size_bytes: int
    scale_classes: dict[str, int]
    """Blocks of the source by ``scales.ScaleClass``; empty if nothing was FP8."""
    notes: tuple[str, ...]
    """What of the source was left out, a sentence each."""


def import_hf(
    hf_dir: Path,
    megatron_dir: Path,
    options: ImportOptions,
    progress: Progress = lambda done, total: None,
) -> ImportResult:
    """Write ``megatron_dir`` from the Hugging Face directory ``hf_dir``.

    Args:
        hf_dir: safetensors files with ``config.json``; bf16, fp32 or block FP8.
        megatron_dir: must not exist yet, or be empty; what is given to Megatron's ``--load``.
        options: choices.
        progress: told after every file.

    Raises:
        FinishedError: if ``megatron_dir`` is what this very import left before.
        UserError: before anything is written, for every wrong input that can be seen then; and for
            a full disk or a NaN afterwards.
    """
    if options.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype '{options.dtype}' is not one of: {', '.join(DTYPES)}")
    require_workers(options.num_workers)
    require_free_or_finished(megatron_dir)
    release = open_release(hf_dir, options.preset)
    source, preset = release.source, release.preset
    audit = audit_source(source.stored, preset, options.only)
    require_clean_source(audit, hf_dir)
    _require_true_copies(source, preset, options)
    files = release_files(source.directory)
    destinations = find_destinations(
        source,
        options.only.take(expand(preset)),
        preset.num_moe_experts,
        None if options.dtype is None else DTYPES[options.dtype],
        options.modules,
    )
    args = _arguments(preset, source.config, destinations)
    jobs = list(file_jobs(destinations))
    record = _conversion_record(source, options) | {"beside": stats_of(files)}
    job_directory = JobDirectory(megatron_dir, record, sum(job.num_bytes for job in jobs))
    weights = job_directory.directory / RELEASE
    weights.mkdir(exist_ok=True)
    if source.is_fp8:
        block_fp8.prepare()
    inputs = ImportInputs(source.directory, options.check_finite, job_directory.fingerprint)
    work = functools.partial(write_file, inputs)
    try:
        receipts = run_jobs(job_directory, jobs, work, options.num_workers, progress)
    finally:
        close_sources()
    with naming_the_file(job_directory.directory):
        _finish(weights, jobs, receipts, args, options.modules)
        _keep_source(job_directory.directory / SOURCE_DIR, source, files, options.only)
        point_tracker(job_directory.directory, RELEASE)
        job_directory.publish()
    classes: Counter[str] = Counter()
    for receipt in receipts:
        classes.update(receipt["scale_classes"])
    size = sum(receipt["num_bytes"] for receipt in receipts)
    return ImportResult(megatron_dir, preset, audit, len(jobs), size, dict(classes), release.notes)


def _arguments(
    preset: ModelPreset, config: dict[str, Any], destinations: list[Destination]
) -> Namespace:
    """Megatron's arguments; bf16 if most of the weights are."""
    dtypes = Counter(destination.dtype for destination in destinations)
    return imported_args(preset, config, is_bf16=dtypes.most_common(1)[0][0] is Dtype.BF16)


def _conversion_record(source: HfSource, options: ImportOptions) -> dict[str, Any]:
    """What makes one import the same as another: the source's files and the choices."""
    files = sorted({tensor.file for tensor in source.stored.values()})
    stats = [(source.directory / file).stat() for file in files]
    return {
        "files": [[f, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)],
        "directory": str(source.directory.resolve()),
        "config": source.config,
        "options": [options.preset, options.dtype, str(options.only), options.check_finite],
        "modules": options.modules,
        "schema_version": 4,
    }


def _require_true_copies(source: HfSource, preset: ModelPreset, options: ImportOptions) -> None:
    """A prediction layer's embedding and head must be the model's: Megatron has no others."""
    pairs = list(options.only.take(expand(preset)))
    originals = {pair.megatron: pair.hf[0] for pair in pairs if not pair.rule.is_copy}
    for pair in pairs:
        if not pair.rule.is_copy or pair.megatron not in originals:
            continue
        (name,), original = pair.hf, originals[pair.megatron]
        for top, end in row_chunks(pair.megatron_shape, 2):
            rows = slice(top, end)
            if not source.read(name, rows).equals(source.read(original, rows)):
                raise UserError(
                    f"{source.directory}: '{name}' differs from '{original}' in rows {top} to "
                    f"{end}; Megatron's prediction layers share the model's"
                )


def _finish(
    release: Path,
    jobs: list[Job],
    receipts: list[Receipt],
    args: Namespace,
    modules: TransformerImpl,
) -> None:
    """What makes the files a checkpoint."""
    chunks = (
        (Path(job.file).name, chunk_from(entry))
        for job, receipt in zip(jobs, receipts, strict=True)
        for entry in receipt["chunks"]
    )
    common = write_common(release, f"__{len(jobs)}_0.distcp", args)
    write_metadata(release, chunks, common, modules)


def _keep_source(
    directory: Path, source: HfSource, files: dict[Path, Path], only: Selection
) -> None:
    """The source's own files, and the scales of its FP8 weights."""
    directory.mkdir(exist_ok=True)
    copy_files(files | {Path("config.json"): source.directory / "config.json"}, directory)
    names = sorted(name for name in source.stored if name.endswith(SCALE_SUFFIX))
    if not names or not only.is_all:
        return
    slots = [TensorSlot(name, source.stored[name].shape, Dtype.FP32) for name in names]
    write_safetensors(directory / SCALES_FILE, slots, (source.read(name) for name in names))
