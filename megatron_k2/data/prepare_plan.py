"""What ``data prepare`` is going to do, decided and checked before any of it is done."""

from dataclasses import dataclass
from pathlib import Path

from megatron_k2.data.hf_tokenizer import check_bpe_vocab_size
from megatron_k2.data.parts import SPLITS, Part, cut_into_parts, default_part_bytes
from megatron_k2.data.sources import (
    DEFAULT_SUFFIXES,
    SourceFile,
    find_files,
    is_validation,
    python_stdlib_files,
)
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json

DEFAULT_JSON_KEY = "text"


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, from what, and how."""

    output: Path
    inputs: tuple[Path, ...] = ()
    """Files and directories; empty together with ``use_python_stdlib``."""
    use_python_stdlib: bool = False
    valid_inputs: tuple[Path, ...] = ()
    """An explicit validation set; then every document of ``inputs`` is for training."""
    tokenizer: Path | None = None
    train_bpe: int | None = None
    """Vocabulary of a byte-level BPE trained on the training split; instead of ``tokenizer``."""
    json_key: str | None = None
    """Field of a JSON object that holds the text, ``DEFAULT_JSON_KEY`` where none was named."""
    validation_fraction: float = 0.05
    """Expected share of documents, by hash of their ids."""
    suffixes: tuple[str, ...] = DEFAULT_SUFFIXES
    num_workers: int = 1

    def __post_init__(self) -> None:
        if bool(self.inputs) == self.use_python_stdlib:
            raise UserError("give either --input PATH... or --python-stdlib")
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise UserError("give either --tokenizer PATH or --train-bpe VOCAB_SIZE")
        if self.train_bpe is not None:
            check_bpe_vocab_size(self.train_bpe)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"--validation-fraction {self.validation_fraction}: expected 0 <= fraction < 1"
            )
        if self.num_workers < 1:
            raise UserError(f"--workers {self.num_workers}: expected at least 1")

    @property
    def key(self) -> str:
        """The field that is read."""
        return DEFAULT_JSON_KEY if self.json_key is None else self.json_key


@dataclass(frozen=True)
class Plan:
    """The plan: what will be read, in which parts, and by which hash it is recognised."""

    description: str
    """Of the source, for a reader."""
    files: list[tuple[SourceFile, float]]
    """Each with its validation fraction."""
    parts: list[Part]
    record: dict[str, str]
    """Hashes of inputs, tokenizer and options, apart so that a change can be named."""

    @property
    def sha256(self) -> str:
        """One hash of the record."""
        return sha256_of_json(self.record)


def _describe(options: PrepareOptions) -> str:
    if options.use_python_stdlib:
        return "Python standard library without its tests"
    return ", ".join(path.resolve().name for path in options.inputs)


def make_plan(options: PrepareOptions) -> Plan:
    """Look at every input without reading any, and load a named tokenizer to see that it is one.

    Raises:
        UserError: an input or the tokenizer cannot be read as one, or a side of the split is empty.
    """
    if options.use_python_stdlib:
        train = python_stdlib_files()
    else:
        train = find_files(options.inputs, options.suffixes)
    valid = find_files(options.valid_inputs, options.suffixes)
    both = {f.path.resolve() for f in train} & {f.path.resolve() for f in valid}
    if both:
        raise UserError(f"{min(both)} is in --input and in --valid-input; leave it out of one")
    if options.json_key is not None and not any(file.is_json for file in (*train, *valid)):
        raise UserError(
            f"--json-key {options.json_key}: no input is JSON by its name (.jsonl, .ndjson, .json, "
            "each with .gz too), so it applies to none; rename the file, or drop the flag"
        )
    fraction = 0.0 if valid else options.validation_fraction
    files = [*((file, fraction) for file in train), *((file, 1.0) for file in valid)]
    # Sizes and times, not contents: hashing a corpus costs a pass over it before the first token.
    seen = [[[f.name, f.num_bytes, f.modified_ns] for f in group] for group in (train, valid)]
    tokenizer = (
        f"byte-level BPE of {options.train_bpe}"
        if options.tokenizer is None
        else load_tokenizer(options.tokenizer).identity
    )
    record = {
        "inputs": sha256_of_json(seen),
        "tokenizer": tokenizer,
        "options": sha256_of_json({"json_key": options.key, "fraction": fraction}),
    }
    part_bytes = default_part_bytes(sum(file.num_bytes for file, _ in files))
    plan = Plan(_describe(options), files, cut_into_parts(files, part_bytes), record)
    _check_split_of_text_files(plan, options)
    return plan


def _check_split_of_text_files(plan: Plan, options: PrepareOptions) -> None:
    """Before any work: do both splits get a file? JSONL lines are only known once read."""
    if any(file.is_json for file, _ in plan.files):
        return
    counts = dict.fromkeys(SPLITS, 0)
    for file, fraction in plan.files:
        counts[SPLITS[is_validation(file.name, fraction)]] += 1
    check_counts(counts, options)


def check_counts(num_documents: dict[str, int], options: PrepareOptions) -> None:
    """Refuse a split with no document where one was asked for."""
    wants_valid = bool(options.valid_inputs) or options.validation_fraction > 0
    if num_documents["train"] == 0 or (wants_valid and num_documents["valid"] == 0):
        raise UserError(
            f"documents for training: {num_documents['train']}, for validation: "
            f"{num_documents['valid']}; both need one. The split is by a hash of each "
            "document's path: change --validation-fraction (0 for no validation) "
            "or name --valid-input"
        )
