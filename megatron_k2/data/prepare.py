"""Text to a dataset directory: the composed algorithm of ``megatron-k2 data prepare``.

    find files -> plan -> tokenizer -> parts (workers) -> merge per split -> dataset.json

Every arrow leaves files that appear whole or not at all, and the manifest comes last. A rerun of
the same command picks up after the last finished part; a rerun with other inputs, another tokenizer
or other options starts over and says so. Either way the result is byte for byte that of an
undisturbed run, whatever the number of workers.
"""

import functools
import hashlib
import shutil
from itertools import chain
from pathlib import Path

from rich.console import Console

from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.data.indexed import bin_path, idx_path, token_dtype, write_indexed
from megatron_k2.data.manifest import (
    MANIFEST_FILE,
    DataManifest,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
    read_manifest,
    write_manifest,
)
from megatron_k2.data.ngram import BASELINE_FILE
from megatron_k2.data.parts import SPLITS, Part, read_documents, read_part, tokenize_part
from megatron_k2.data.pool import worker_tokenizer
from megatron_k2.data.prepare_plan import Plan, PrepareOptions, check_counts, make_plan
from megatron_k2.data.resumable import (
    PARTS_DIRECTORY,
    TOKENIZER_DIRECTORY,
    check_unchanged,
    locked,
    refuse_other_kind,
    start_or_resume,
    work_through,
)
from megatron_k2.data.sources import passed_over
from megatron_k2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_k2.errors import UserError


def _clear(output: Path) -> None:
    """Remove what a finished run left, but for its manifest and tokenizer."""
    for path in [output / BASELINE_FILE, *_data_files(output)]:
        path.unlink(missing_ok=True)
    # Megatron's sample indices are of no use without the tokens that they point into.
    for split in SPLITS:
        for indices in output.glob(f"{split}/cache/*Dataset_indices"):
            shutil.rmtree(indices, ignore_errors=True)


def _data_files(output: Path) -> list[Path]:
    return [
        path for split in SPLITS for path in (bin_path(output / split), idx_path(output / split))
    ]


def _provide_tokenizer(plan: Plan, options: PrepareOptions, console: Console) -> Tokenizer:
    """Put the tokenizer's files into the dataset, training it first if that was asked for."""
    final = options.output / TOKENIZER_DIRECTORY
    if not final.is_dir():
        partial = options.output / PARTS_DIRECTORY / TOKENIZER_DIRECTORY
        shutil.rmtree(partial, ignore_errors=True)
        if options.tokenizer is not None:
            load_tokenizer(options.tokenizer).save(partial)
        else:
            assert options.train_bpe is not None
            console.print(f"training a byte-level BPE of {options.train_bpe} on the training split")
            texts = (
                document.text
                for part in plan.parts
                for split, document in read_documents(part, options.key)
                if split == "train"
            )
            train_byte_bpe(texts, options.train_bpe, partial)
        partial.rename(final)
    return load_tokenizer(final)


def _work(
    part: Part, tokenizer_directory: Path, identity: str, json_key: str, directory: Path
) -> int:
    tokenizer = worker_tokenizer(tokenizer_directory, identity)
    return tokenize_part(part, tokenizer, json_key, directory)


def _merge(plan: Plan, options: PrepareOptions, tokenizer: Tokenizer) -> DataManifest:
    """Concatenate the parts, split by split, and describe the result."""
    directory = options.output / PARTS_DIRECTORY
    num_documents, num_tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    digest, num_empty = hashlib.sha256(), 0
    for part in plan.parts:
        content = read_part(part, directory, splits=())
        digest.update(bytes.fromhex(content.sha256))
        num_empty += content.num_empty_documents
        for split in SPLITS:
            num_documents[split] += len(content.lengths[split])
            num_tokens[split] += int(content.lengths[split].sum())
    check_counts(num_documents, options)
    splits = {}
    for split in (s for s in SPLITS if num_documents[s]):
        prefix = options.output / split
        documents = chain.from_iterable(
            read_part(part, directory, splits=(split,)).documents(split) for part in plan.parts
        )
        write_indexed(prefix, documents, token_dtype(tokenizer.vocab_size))
        splits[split] = SplitRecord(
            prefix=split,
            num_documents=num_documents[split],
            num_tokens=num_tokens[split],
            bin_bytes=bin_path(prefix).stat().st_size,
            idx_bytes=idx_path(prefix).stat().st_size,
        )
    return DataManifest(
        tokenizer=TokenizerRecord(
            kind=tokenizer.kind,
            path=TOKENIZER_DIRECTORY,
            identity=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
        ),
        splits=splits,
        source=SourceRecord(
            description=plan.description,
            num_files=len(plan.files),
            num_bytes=sum(file.num_bytes for file, _ in plan.files),
            num_empty_documents=num_empty,
            content_sha256=digest.hexdigest(),
        ),
        plan_sha256=plan.sha256,
    )


def _finished(plan: Plan, output: Path) -> DataManifest | None:
    """The manifest of this very plan, if the directory holds it whole."""
    if not (output / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(output)
    except UserError:
        return None
    return manifest if manifest.plan_sha256 == plan.sha256 else None


def prepare(options: PrepareOptions, console: Console | None = None) -> DataManifest:
    """Make, resume or recognise the dataset that ``options`` describe.

    Args:
        options: Checked when they were made.
        console: For progress (a terminal only) and for the line that says whether a run starts
            over or resumes; standard error if None.

    Returns:
        The manifest, as written to ``dataset.json``.

    Raises:
        UserError: an input, the tokenizer or a document cannot be used.
    """
    console = console or Console(stderr=True)
    plan = make_plan(options)
    others = passed_over((*options.inputs, *options.valid_inputs), options.suffixes)
    if others:
        listed = ", ".join(f"{number} {ending}" for ending, number in sorted(others.items()))
        console.print(f"not taken from the directories, see --suffix: {listed}")
    refuse_other_kind(options.output, MANIFEST_FILE)
    with locked(options.output):
        manifest = _finished(plan, options.output)
        if manifest is None:
            output = options.output
            clear = functools.partial(_clear, output)
            start_or_resume(plan.record, plan.parts, output, MANIFEST_FILE, clear, console)
            tokenizer = _provide_tokenizer(plan, options, console)
            work = functools.partial(
                _work,
                tokenizer_directory=output / TOKENIZER_DIRECTORY,
                identity=tokenizer.identity,
                json_key=options.key,
                directory=output / PARTS_DIRECTORY,
            )
            work_through(plan.parts, work, output, options.num_workers, console)
            check_unchanged(file for file, _ in plan.files)
            manifest = _merge(plan, options, tokenizer)
            write_manifest(options.output, manifest)
        else:
            console.print(f"{options.output} is complete already")
        shutil.rmtree(options.output / PARTS_DIRECTORY, ignore_errors=True)
    return manifest
