"""Megatron checkpoint -> Hugging Face directory, streaming, whole or not at all.

Order of work: open the checkpoint, settle the shape, audit every key, look at the disk; then write
shard after shard into ``<directory>.partial`` beside the target (``stream/jobs.py``), and rename
when everything is on the disk. Killed at any moment and started again, it goes on with the shards
that are missing.

One layer is one shard, ``model-{i}-of-{n}.safetensors``, i from 1 without padding, as in K2's
release: embedding with layer 0, norm and head with the last. ``max_shard_bytes`` cuts by size
instead.

What the checkpoint does not know (other fields of ``config.json``, tokenizer, FP8 scales) is taken
from the directory its weights were imported from, if one is found (``source_trail``).
"""

import dataclasses
import functools
import importlib.metadata
import json
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_k2 import __version__
from megatron_k2.checkpoint.block_fp8 import convert as block_fp8
from megatron_k2.checkpoint.convert.export_shards import (
    DTYPES,
    ExportInputs,
    close_sources,
    plan_shards,
    write_shard,
)
from megatron_k2.checkpoint.hf.config import generation_config
from megatron_k2.checkpoint.hf.model_card import model_card
from megatron_k2.checkpoint.hf.quantization import BlockFp8, quantization_like
from megatron_k2.checkpoint.hf.reader import INDEX
from megatron_k2.checkpoint.hf.release_files import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    copy_files,
    files_along,
    own_chat_template,
    stats_of,
)
from megatron_k2.checkpoint.lora.adapters import AdapterSource, is_adapters
from megatron_k2.checkpoint.names.audit import require_clean
from megatron_k2.checkpoint.names.mapping import expand
from megatron_k2.checkpoint.names.selection import Selection
from megatron_k2.checkpoint.run_config import run_config, settle_preset, template_of
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
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.checkpoint.torch_dist.source_trail import SCALES_FILE, find_source_release
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.presets import ModelPreset
from megatron_k2.run.iterations import find_iteration


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What a person may choose; None: take it from the checkpoint's saved arguments."""

    preset: str | None = None
    iteration: int | None = None
    dtype: str = "bf16"
    """``bf16``, ``fp32``, or ``fp8``: block FP8 for what a release holds so, else bf16."""
    model_type: str | None = None
    """None: the source release's, else ``kimi_k2``."""
    use_yarn: bool | None = None
    tokenizer: Path | None = None
    source_release: Path | None = None
    """Hugging Face directory whose other fields, files and FP8 scales are taken; None: found by
    the checkpoint's own trail."""
    max_shard_bytes: int | None = None
    """None: one layer a shard."""
    only: Selection = dataclasses.field(default_factory=Selection)
    num_workers: int = 1
    check_finite: bool = False
    """Refuse NaN and infinite weights."""
    base: Path | None = None
    """Of a checkpoint of adapters, which are merged into it; None: where they were trained over."""


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What an export wrote, for the line that the command prints."""

    directory: Path
    preset: ModelPreset
    num_tensors: int
    num_shards: int
    total_size_bytes: int
    source_release: Path | None
    """Where other fields and FP8 scales came from."""
    blocks: dict[str, int]
    """FP8 blocks by ``kept`` (source's scale and codes) and ``fresh``; empty without FP8."""
    has_power_of_two_scales: bool
    """Fresh scales are amax / 448 rounded up to a power of two, not as it is."""


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
        FinishedError: if ``hf_dir`` is what this very export left before.
        UserError: before anything is written, for every wrong input that can be seen then.
    """
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype '{options.dtype}' is not one of: {', '.join(DTYPES)}")
    require_workers(options.num_workers)
    require_free_or_finished(hf_dir)
    plan = _planned(megatron_dir, options)
    size = sum(job.num_bytes for job in plan.jobs)
    job_directory = JobDirectory(hf_dir, _conversion_record(plan, options), size)
    if plan.fp8 is not None:
        block_fp8.prepare()
    inputs = ExportInputs(
        plan.source.directory,
        options.check_finite,
        plan.scales,
        plan.fp8 is not None and plan.fp8.has_power_of_two_scales,
        job_directory.fingerprint,
        None if plan.adapters is None else plan.adapters.source.directory,
        plan.preset,
    )
    work = functools.partial(write_shard, inputs)
    try:
        receipts = run_jobs(job_directory, plan.jobs, work, options.num_workers, progress)
    finally:
        close_sources()
    with naming_the_file(hf_dir):
        total_bytes, num_tensors = _write_index(job_directory.directory, plan.jobs, receipts)
        _write_files(job_directory.directory, plan, options)
        job_directory.publish()
    blocks: Counter[str] = Counter()
    for receipt in receipts:
        blocks.update(receipt["blocks"])
    return ExportResult(
        hf_dir,
        plan.preset,
        num_tensors,
        len(plan.jobs),
        total_bytes,
        plan.source_release,
        dict(blocks),
        inputs.power_of_two,
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What an export writes, settled before it writes anything."""

    source: MegatronSource
    """Of a whole model; of adapters their base."""
    adapters: AdapterSource | None
    """What is merged into it."""
    source_release: Path | None
    files: dict[Path, Path]
    """Beside the weights: name -> where it lies."""
    chat_template: str | None
    """Ours, where the files bring none and it fits their tokenizer."""
    preset: ModelPreset
    fp8: BlockFp8 | None
    config: dict[str, Any]
    """Content of ``config.json``."""
    jobs: list[Job]
    scales: Path | None
    """Of the source release's FP8 weights; may be absent."""


def _planned(megatron_dir: Path, options: ExportOptions) -> _Plan:
    source = MegatronSource(find_iteration(megatron_dir, options.iteration))
    saved, adapters = source.args, None
    if is_adapters(source):
        adapters = AdapterSource(source, options.base)
        source = MegatronSource(adapters.base_directory)
        megatron_dir = adapters.base_directory
        saved = adapters.shape_args(source.args)
    source_release = find_source_release(megatron_dir, source, options.source_release)
    files = files_along(options.tokenizer, source_release)
    preset = settle_preset(saved, options.preset, options.use_yarn)
    template = template_of(source_release)
    fp8 = quantization_like(template) if options.dtype == "fp8" else None
    config = _config(saved, preset, options, template, fp8)
    require_clean(source.shapes, preset, only=options.only)
    if adapters is not None:
        adapters.require_matched(list(expand(preset)))
    jobs = plan_shards(
        options.only.take(expand(preset)),
        preset.num_layers + preset.num_mtp_layers,
        DTYPES[options.dtype],
        fp8,
        options.max_shard_bytes,
    )
    scales = source_release / SCALES_FILE if source_release and options.dtype == "fp8" else None
    template_text = own_chat_template(files)
    return _Plan(
        *(source, adapters, source_release, files, template_text),
        *(preset, fp8, config, jobs, scales),
    )


def _write_files(directory: Path, plan: _Plan, options: ExportOptions) -> None:
    """Configuration, model card, and what goes along beside the weights."""
    _write_json(directory / "config.json", plan.config)
    if Path(GENERATION_CONFIG) not in plan.files:
        _write_json(directory / GENERATION_CONFIG, generation_config(plan.config))
    card = _card(plan.source, plan.preset, options, plan.config["model_type"])
    write_atomically(directory / "README.md", card.encode())
    copy_files(plan.files, directory)
    if plan.chat_template is not None:
        write_atomically(directory / CHAT_TEMPLATE, plan.chat_template.encode())


def _config(
    saved: Any,
    preset: ModelPreset,
    options: ExportOptions,
    template: dict[str, Any] | None,
    fp8: BlockFp8 | None,
) -> dict[str, Any]:
    dtype = "fp32" if options.dtype == "fp32" else "bf16"
    kind = options.model_type
    config = run_config(saved, preset, template, model_type=kind, dtype=dtype)
    if fp8 is not None:
        config["quantization_config"] = fp8.config
    return config


def _conversion_record(plan: _Plan, options: ExportOptions) -> dict[str, Any]:
    """What makes one export the same as another."""
    metadata = (plan.source.directory / ".metadata").stat()
    kept = plan.scales.stat() if plan.scales is not None and plan.scales.is_file() else None
    return {
        "directory": str(plan.source.directory.resolve()),
        "metadata": [metadata.st_size, metadata.st_mtime_ns],
        "config": plan.config,
        "scales": None if kept is None else [str(plan.scales), kept.st_size, kept.st_mtime_ns],
        "options": [options.dtype, str(options.only), options.check_finite],
        "max_shard_bytes": options.max_shard_bytes,
        "files": stats_of(plan.files),
        "adapters": None if plan.adapters is None else _adapters_record(plan.adapters),
        "schema_version": 4,
    }


def _adapters_record(adapters: AdapterSource) -> list[Any]:
    metadata = (adapters.source.directory / ".metadata").stat()
    directory = str(adapters.source.directory.resolve())
    return [directory, metadata.st_size, metadata.st_mtime_ns, adapters.rank, adapters.alpha]


def _write_index(directory: Path, jobs: list[Job], receipts: list[Receipt]) -> tuple[int, int]:
    """The index file; ``total_size`` in bytes and the number of tensors."""
    weight_map = {
        name: job.file
        for job, receipt in zip(jobs, receipts, strict=True)
        for name in receipt["names"]
    }
    total_bytes = sum(receipt["tensor_bytes"] for receipt in receipts)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(directory / INDEX, index)
    return total_bytes, len(weight_map)


def _card(
    source: MegatronSource, preset: ModelPreset, options: ExportOptions, model_type: str
) -> str:
    samples = getattr(source.args, "consumed_train_samples", None)
    seq_length = getattr(source.args, "seq_length", None)
    return model_card(
        preset,
        checkpoint=source.directory.name,
        iteration=source.common.get("iteration") or None,
        num_tokens=samples * seq_length if samples and seq_length else None,
        dtype=options.dtype,
        model_type=model_type,
        versions={
            "megatron-k2": __version__,
            "megatron-core": importlib.metadata.version("megatron-core"),
            "torch": importlib.metadata.version("torch"),
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())
