"""What ``data chat`` is going to do, decided and checked before any of it is done."""

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_k2.chat.control import control_ids
from megatron_k2.chat.template import CANONICAL, Format
from megatron_k2.data.parts import Part, Span, cut_into_parts, default_part_bytes
from megatron_k2.data.sources import SourceFile, find_files
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.sft.forms import check_form
from megatron_k2.sft.packing import METHODS, Method
from megatron_k2.sft.rows import SUFFIXES, kind_of_dialogues, read_rows
from megatron_k2.sft.tokenize import CALL_IDS, TOO_LONG, TRAINED, CallIds, Rules, TooLong, Trained


@dataclass(frozen=True)
class ChatOptions:
    """Which dialogues to prepare, and how."""

    output: Path
    inputs: tuple[Path, ...]
    """Files and directories."""
    tokenizer: Path
    sequence_length: int
    """Positions of a sequence."""
    valid_inputs: tuple[Path, ...] = ()
    """An explicit validation set; then every dialogue of ``inputs`` is for training."""
    form: Format = CANONICAL
    multiple: int = 1
    """To which a document's positions are padded; 2 x the context-parallel size."""
    method: Method = "best-fit"
    too_long: TooLong = "drop"
    trained: Trained = "all"
    call_ids: CallIds = "number"
    validation_fraction: float = 0.05
    """Expected share of dialogues, by their content hash."""
    num_workers: int = 1

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("no input; give --input PATH...")
        for flag, value, choices in (
            ("--pack", self.method, METHODS),
            ("--too-long", self.too_long, TOO_LONG),
            ("--train-on", self.trained, TRAINED),
            ("--call-ids", self.call_ids, CALL_IDS),
        ):
            if value not in choices:
                raise UserError(f"{flag} {value}: expected one of {', '.join(choices)}")
        if self.multiple < 1 or self.sequence_length < 1 or self.sequence_length % self.multiple:
            raise UserError(
                f"--sequence-length {self.sequence_length} --multiple {self.multiple}: expected a "
                "positive length that is a multiple of the second"
            )
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"--validation-fraction {self.validation_fraction}: expected 0 <= fraction < 1"
            )
        if self.num_workers < 1:
            raise UserError(f"--workers {self.num_workers}: expected at least 1")
        if self.tokenizer.resolve().is_relative_to(self.output.resolve()):
            raise UserError(
                f"--tokenizer {self.tokenizer} lies in --output, which starting over clears; name "
                "the one it was copied from"
            )

    @property
    def rules(self) -> Rules:
        """How a sample becomes tokens."""
        return Rules(self.form, self.sequence_length, self.too_long, self.trained, self.call_ids)

    @property
    def wants_validation(self) -> bool:
        """Whether there must be a validation split."""
        return bool(self.valid_inputs) or self.validation_fraction > 0


@dataclass(frozen=True)
class ChatPlan:
    """What will be read, in which parts, and by which hash it is recognised."""

    description: str
    files: list[tuple[SourceFile, float]]
    """Each with its validation fraction."""
    parts: list[Part]
    record: dict[str, str]
    """Hashes of inputs, tokenizer and options, apart so that a change can be named."""

    @property
    def sha256(self) -> str:
        """One hash of the record."""
        return sha256_of_json(self.record)


def make_plan(options: ChatOptions) -> ChatPlan:
    """Look at every input and its first row, and at the tokenizer.

    Raises:
        UserError: an input is missing or of another form, or the tokenizer has no control tokens.
    """
    train, valid = (
        find_files(inputs, SUFFIXES, kind_of_dialogues)
        for inputs in (options.inputs, options.valid_inputs)
    )
    if both := {f.path.resolve() for f in train} & {f.path.resolve() for f in valid}:
        raise UserError(f"{min(both)} is in --input and in --valid-input; leave it out of one")
    fraction = 0.0 if valid else options.validation_fraction
    files = [*((file, fraction) for file in train), *((file, 1.0) for file in valid)]
    tokenizer = load_tokenizer(options.tokenizer)
    control_ids(tokenizer)
    for file, _ in files:
        _check_first_row(file)
    # Sizes and times, not contents: hashing a set costs a pass over it before the first token.
    seen = [[[f.name, f.num_bytes, f.modified_ns] for f in group] for group in (train, valid)]
    made = {
        "form": asdict(options.form),
        "sequence_length": options.sequence_length,
        "multiple": options.multiple,
        "method": options.method,
        "too_long": options.too_long,
        "trained": options.trained,
        "call_ids": options.call_ids,
        "fraction": fraction,
    }
    record = {
        "inputs": sha256_of_json(seen),
        "tokenizer": tokenizer.identity,
        "options": sha256_of_json(made),
    }
    part_bytes = default_part_bytes(sum(file.num_bytes for file, _ in files))
    description = ", ".join(path.resolve().name for path in options.inputs)
    return ChatPlan(description, files, cut_into_parts(files, part_bytes), record)


def _check_first_row(file: SourceFile) -> None:
    """A first row of another form makes the file one; a damaged row is for the rejects."""
    first = next(read_rows(Span(file, 0, file.num_bytes, 0.0)), None)
    if first is not None and first.value is not None:
        try:
            check_form(first.value)
        except ValueError as problem:
            raise UserError(f"{file.path}: {problem}") from None
