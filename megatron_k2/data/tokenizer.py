"""The tokenizer every stage of the data path speaks to, and how one is found on disk.

Three kinds, each in its own module: K2's tiktoken vocabulary, a Hugging Face ``tokenizer.json``
(which is also what ``train_byte_bpe`` writes), and whatever else ``transformers`` reads.
"""

from pathlib import Path
from typing import Protocol

from megatron_k2.data.hf_tokenizer import TOKENIZER_FILES, TokenizerJson, TransformersTokenizer
from megatron_k2.data.kinds import check_is_here
from megatron_k2.data.tiktoken_tokenizer import VOCABULARY_FILE, TiktokenTokenizer
from megatron_k2.errors import UserError


class Tokenizer(Protocol):
    """Text to ids and back. Never adds a BOS or EOD of its own accord."""

    kind: str
    """Which implementation reads it: ``tiktoken``, ``tokenizer.json`` or ``transformers``."""
    vocab_size: int
    """Largest id + 1: the embedding rows needed, before any padding for tensor parallelism."""
    eod_id: int
    """Closes each document of an indexed dataset."""
    bos_id: int | None
    special_ids: dict[str, int]
    """Name to id of the control tokens, placed by id by whoever builds a format."""
    identity: str
    """sha256 over names and contents of its files."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; names of control tokens in it stay letters."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, control tokens by their names."""

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id below ``vocab_size``, control tokens' names, nothing for holes.

        Raises:
            UserError: its tokens are not bytes.
        """

    def save(self, directory: Path) -> None:
        """Write the Hugging Face files of this tokenizer into ``directory``."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from a directory, a ``tokenizer.json`` or a ``tiktoken.model``.

    Raises:
        UserError: if nothing there is a tokenizer; says what was looked for.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"tokenizer {path} does not exist; expected a directory with {VOCABULARY_FILE} or "
            "tokenizer.json, or one of these files"
        )
    directory = path if path.is_dir() else path.parent
    wanted = [VOCABULARY_FILE, *TOKENIZER_FILES] if path.is_dir() else [path.name]
    present = [name for name in wanted if (directory / name).is_file()]
    for name in present:
        check_is_here(directory / name)
    if VOCABULARY_FILE in present:
        return TiktokenTokenizer(directory)
    if "tokenizer.json" in present:
        return TokenizerJson(directory)
    if path.is_dir() and present:
        return TransformersTokenizer(directory)
    raise UserError(
        f"{path} is not a tokenizer; expected a directory with {VOCABULARY_FILE} (Kimi K2), "
        "tokenizer.json or another Hugging Face tokenizer's files"
    )
