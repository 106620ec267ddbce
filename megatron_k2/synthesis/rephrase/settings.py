"""What a run's output hangs on, as one frozen record, and the documents that it reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_k2.data.parts import Part, Span, read_documents
from megatron_k2.data.sources import DEFAULT_SUFFIXES, Document, SourceFile, find_files
from megatron_k2.errors import UserError
from megatron_k2.fidelity.check import Settings as CheckSettings
from megatron_k2.files import sha256_of_json
from megatron_k2.synthesis.rephrase.pieces import EXCERPT_TOKENS, PIECE_TOKENS, Cut
from megatron_k2.synthesis.rephrase.prompts import Prompt, read_styles

type Kind = Literal["knowledge", "mathematics", "translation"]
MOST_REPHRASINGS = 2
"""Of one corpus: the report's rule in production (section 2.2)."""
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Settings:
    """The record; JSON by ``to_object``.

    Raises:
        UserError: a value is none of those expected.
    """

    inputs: tuple[str, ...]
    """Files and directories, as ``data prepare`` reads them."""
    model: str
    """That rewrites."""
    check_model: str | None = None
    """That judges statements; without one every verdict is *unverified*."""
    kind: Kind = "knowledge"
    style_set: str = ""
    """Of ours by name, or a file; empty: of the kind's own name."""
    rephrasings: int = 1
    """Of each document."""
    seed: int = 0
    temperature: float = 0.7
    """Ours: the report states none, and SwallowMath's 0.2 leaves rephrasings alike."""
    top_p: float = 0.95
    piece_tokens: int = PIECE_TOKENS
    excerpt_tokens: int = EXCERPT_TOKENS
    tokenizer: str | None = None
    """Whose tokens are counted; without one they are estimated."""
    num_votes: int = 5
    """At most, on one statement."""
    extracts: bool = False
    """Whether the model that checks lists the statements first."""
    least_support: float = 0.0
    """Mean P(supported) that every statement must have, from ``rephrase calibrate``."""
    json_key: str = "text"
    suffixes: tuple[str, ...] = DEFAULT_SUFFIXES
    source_licence: str = NOT_STATED
    teacher_licence: str = NOT_STATED
    """Terms under which the model's output may be used."""
    inputs_sha256: str = field(default="", compare=False)
    """Of names, sizes and times of the files."""
    prompts_sha256: str = ""

    def __post_init__(self) -> None:
        if self.kind not in (kinds := get_args(Kind.__value__)):
            raise UserError(f"--kind {self.kind}: expected one of {', '.join(kinds)}")
        if self.rephrasings < 1:
            raise UserError(f"--rephrasings {self.rephrasings}: expected 1 or more")
        if not (0 <= self.temperature <= 2 and 0 < self.top_p <= 1):
            raise UserError(
                f"--temperature {self.temperature:g}, --top-p {self.top_p:g}: expected 0 to 2 and "
                "more than 0 up to 1"
            )
        Cut(self.piece_tokens, self.excerpt_tokens)
        self.check_settings()

    def check_settings(self) -> CheckSettings:
        """How the model that checks is asked.

        Raises:
            UserError: an even number of votes, or a share outside 0 to 1.
        """
        return CheckSettings(
            self.num_votes,
            self.extracts,
            self.least_support,
            has_gates=self.kind == "knowledge",
        )

    @property
    def cut(self) -> Cut:
        """Sizes of pieces."""
        return Cut(self.piece_tokens, self.excerpt_tokens)

    @property
    def warnings(self) -> list[str]:
        """What is allowed and against a rule."""
        found = []
        if self.rephrasings > MOST_REPHRASINGS:
            found.append(
                f"--rephrasings {self.rephrasings}: the report rephrases a corpus at most "
                f"{MOST_REPHRASINGS} times in production (section 2.2)"
            )
        for name in ("source_licence", "teacher_licence"):
            if getattr(self, name) == NOT_STATED:
                flag = name.replace("_", "-")
                found.append(f"--{flag} is {NOT_STATED}, and will be in every record's lineage")
        return found

    def prompts(self) -> list[Prompt]:
        """Of the style set."""
        return read_styles(self.style_set or self.kind)

    def files(self) -> list[SourceFile]:
        """The inputs' files."""
        return find_files([Path(each) for each in self.inputs], self.suffixes)

    def documents(self) -> Iterator[Document]:
        """Every document that has text, in the inputs' order.

        Raises:
            UserError: a file or a line cannot be read.
        """
        spans = tuple(Span(file, 0, max(file.num_bytes, 1), 0.0) for file in self.files())
        for _, document in read_documents(Part(0, spans), self.json_key):
            if document.text.strip():
                yield document

    def to_object(self) -> dict[str, Any]:
        """JSON, with the hashes of files and prompts as they are now."""
        seen = [[f.name, f.num_bytes, f.modified_ns] for f in self.files()]
        prompts = [each.sha256 for each in self.prompts()]
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "inputs": list(self.inputs),
            "suffixes": list(self.suffixes),
            "inputs_sha256": sha256_of_json(seen),
            "prompts_sha256": sha256_of_json(prompts),
        }


def settings_from(value: Mapping[str, Any]) -> Settings:
    """What ``to_object`` made.

    Raises:
        UserError: it did not make this.
    """
    try:
        found = {**value, "inputs": tuple(value["inputs"]), "suffixes": tuple(value["suffixes"])}
        return Settings(**found)
    except (TypeError, KeyError) as error:
        raise UserError(f"the settings of a run are damaged: {error}") from None
