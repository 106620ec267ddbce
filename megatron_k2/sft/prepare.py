"""Dialogues to a packed set on disk: the composed algorithm of ``megatron-k2 data chat``.

    find files -> plan -> parts (workers) -> choose -> write arrays -> pack -> chat.json

Every arrow leaves files that appear whole or not at all, and the manifest comes last. A rerun of
the same command picks up after the last finished part. Either way the result is byte for byte that
of an undisturbed run, whatever the number of workers.
"""

import functools
import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_k2.data.manifest import TokenizerRecord
from megatron_k2.data.parts import SPLITS
from megatron_k2.data.resumable import (
    PARTS_DIRECTORY,
    TOKENIZER_DIRECTORY,
    check_unchanged,
    locked,
    refuse_other_kind,
    start_or_resume,
    work_through,
)
from megatron_k2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_k2.errors import UserError
from megatron_k2.files import commit_file, write_atomically
from megatron_k2.sft.choose import Chosen, choose, write_rejects
from megatron_k2.sft.manifest import (
    MANIFEST_FILE,
    ChatManifest,
    PackingRecord,
    SourceRecord,
    SplitRecord,
    packs_file,
    read_manifest,
    write_manifest,
)
from megatron_k2.sft.packing import Packs, fill_of, pack
from megatron_k2.sft.prepare_plan import ChatOptions, ChatPlan, make_plan
from megatron_k2.sft.tokenize import PartSamples, tokenize_part

REJECTS_FILE = "rejects.jsonl"


def prepare_chat(options: ChatOptions, console: Console | None = None) -> ChatManifest:
    """Make, resume or recognise the set that ``options`` describe.

    Args:
        options: Checked when they were made.
        console: For progress (a terminal only) and for the line that says whether a run starts
            over or resumes; standard error if None.

    Returns:
        The manifest, as written to ``chat.json``.

    Raises:
        UserError: an input or the tokenizer cannot be used, or nothing is left to train on.
    """
    console = console or Console(stderr=True)
    plan, output = make_plan(options), options.output
    refuse_other_kind(output, MANIFEST_FILE)
    with locked(output):
        manifest = _finished(plan, output)
        if manifest is None:
            clear = functools.partial(_clear, output)
            start_or_resume(plan.record, plan.parts, output, MANIFEST_FILE, clear, console)
            tokenizer = _provide_tokenizer(options)
            work = functools.partial(
                tokenize_part,
                tokenizer_directory=output / TOKENIZER_DIRECTORY,
                identity=tokenizer.identity,
                rules=options.rules,
                directory=output / PARTS_DIRECTORY,
            )
            work_through(plan.parts, work, output, options.num_workers, console)
            check_unchanged(file for file, _ in plan.files)
            manifest = _merge(plan, options, tokenizer)
            write_manifest(output, manifest)
        else:
            console.print(f"{output} is complete already")
        shutil.rmtree(output / PARTS_DIRECTORY, ignore_errors=True)
    return manifest


def _finished(plan: ChatPlan, output: Path) -> ChatManifest | None:
    """The manifest of this very plan, if the directory holds it whole."""
    if not (output / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(output)
    except UserError:
        return None
    return manifest if manifest.plan_sha256 == plan.sha256 else None


def _clear(output: Path) -> None:
    (output / REJECTS_FILE).unlink(missing_ok=True)
    for split in SPLITS:
        for path in (*output.glob(f"{split}.*.npy"), *output.glob(f"{split}.packs-*.npz")):
            path.unlink()


def _provide_tokenizer(options: ChatOptions) -> Tokenizer:
    final = options.output / TOKENIZER_DIRECTORY
    if not final.is_dir():
        partial = options.output / PARTS_DIRECTORY / TOKENIZER_DIRECTORY
        shutil.rmtree(partial, ignore_errors=True)
        load_tokenizer(options.tokenizer).save(partial)
        partial.rename(final)
    return load_tokenizer(final)


def _merge(plan: ChatPlan, options: ChatOptions, tokenizer: Tokenizer) -> ChatManifest:
    """Choose samples, write each split and its sequences, and describe the result."""
    directory, output = options.output / PARTS_DIRECTORY, options.output
    chosen = choose(plan.parts, directory)
    rejected = Counter(each.kind for each in chosen.rejects)
    write_rejects(chosen, output / REJECTS_FILE)
    _check_counts(chosen, options, rejected)
    digest = hashlib.sha256()
    for part in chosen.parts:
        digest.update(bytes.fromhex(part.sha256))
    splits = {
        split: _write_split(split, chosen, options, tokenizer)
        for split in SPLITS
        if any(len(kept[split]) for kept in chosen.kept)
    }
    return ChatManifest(
        tokenizer=TokenizerRecord(
            kind=tokenizer.kind,
            path=TOKENIZER_DIRECTORY,
            identity=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
        ),
        template={
            **asdict(options.form),
            "train_on": options.trained,
            "call_ids": options.call_ids,
        },
        splits=splits,
        packing=PackingRecord(
            options.sequence_length, options.multiple, options.method, options.too_long
        ),
        source=SourceRecord(
            description=plan.description,
            num_files=len(plan.files),
            num_bytes=sum(file.num_bytes for file, _ in plan.files),
            num_read=sum(part.num_read for part in chosen.parts),
            rejected=dict(sorted(rejected.items())),
            num_truncated=sum(part.num_truncated for part in chosen.parts),
            content_sha256=digest.hexdigest(),
        ),
        plan_sha256=plan.sha256,
    )


def _check_counts(chosen: Chosen, options: ChatOptions, rejected: Counter[str]) -> None:
    counts = {split: sum(len(kept[split]) for kept in chosen.kept) for split in SPLITS}
    if counts["train"] and (counts["valid"] or not options.wants_validation):
        return
    why = ", ".join(f"{kind} {number:,}" for kind, number in sorted(rejected.items())) or "none"
    raise UserError(
        f"dialogues for training: {counts['train']}, for validation: {counts['valid']}; left out: "
        f"{why} (see {options.output / REJECTS_FILE}). The split is by a hash of each dialogue: "
        "change --validation-fraction (0 for no validation) or name --valid-input"
    )


def _write_split(
    split: str, chosen: Chosen, options: ChatOptions, tokenizer: Tokenizer
) -> SplitRecord:
    pairs = list(zip(chosen.parts, (kept[split] for kept in chosen.kept), strict=True))
    lengths = np.concatenate([part.lengths[kept] for part, kept in pairs])
    weights = np.concatenate([part.weights[kept] for part, kept in pairs])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    output = options.output
    num_trained = _write_tokens(split, pairs, offsets, output)
    for name, array in (("offsets", offsets), ("weights", weights)):
        _write_array(output / f"{split}.{name}.npy", array)
    packs = pack(lengths, options.sequence_length, multiple=options.multiple, method=options.method)
    packed = packs_file(split, options.sequence_length, options.multiple, options.method)
    _write_packs(output / packed, packs)
    names = [*(f"{split}.{name}.npy" for name in ("tokens", "mask", "offsets", "weights")), packed]
    return SplitRecord(
        num_samples=len(lengths),
        num_tokens=int(offsets[-1]),
        num_trained_tokens=num_trained,
        num_sequences=len(packs),
        fill=fill_of(packs, lengths, options.sequence_length),
        file_bytes={name: (output / name).stat().st_size for name in names},
    )


def _write_tokens(
    split: str, pairs: list[tuple[PartSamples, np.ndarray]], offsets: np.ndarray, output: Path
) -> int:
    """Tokens and masks of the samples that are kept; returns how many tokens are trained."""
    num_trained, at, partials = 0, 0, {}
    arrays: dict[str, np.ndarray] = {}
    for part, kept in pairs:
        for name, values in zip(("tokens", "mask"), _kept_of(part, kept), strict=True):
            if name not in arrays:
                partials[name] = output / f".{split}.{name}.partial.npy"
                arrays[name] = np.lib.format.open_memmap(
                    partials[name], mode="w+", dtype=values.dtype, shape=(int(offsets[-1]),)
                )
            arrays[name][at : at + len(values)] = values
            num_trained += int(values.sum()) if name == "mask" else 0
        at += int(part.lengths[kept].sum())
    for name, array in arrays.items():
        array.flush()  # type: ignore[attr-defined]  # a memory map
        commit_file(partials[name], output / f"{split}.{name}.npy")
    return num_trained


def _kept_of(part: PartSamples, kept: np.ndarray) -> Iterator[np.ndarray]:
    """Tokens, then mask, of a part's samples that are kept."""
    is_kept = np.zeros(len(part.lengths), dtype=bool)
    is_kept[kept] = True
    per_token = np.repeat(is_kept, part.lengths)
    for values in part.tokens_and_mask():
        yield values[per_token]


def _write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def _write_packs(path: Path, packs: Packs) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, samples=packs.samples, offsets=packs.offsets)
    write_atomically(path, buffer.getvalue())
