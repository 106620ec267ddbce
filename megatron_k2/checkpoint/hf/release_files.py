"""What goes along with a model, in either direction, beside its weights and ``config.json``.

Copied as it is and never run: tokenizer files, generation config, licence, and the code files that
``auto_map`` in ``config.json`` names.
"""

from pathlib import Path

from megatron_k2.errors import UserError

GENERATION_CONFIG = "generation_config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tiktoken.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Beside ``tokenization_*.py``."""


def _is_tokenizers(path: Path) -> bool:
    return path.name in TOKENIZER_FILES or path.name.startswith("tokenization_")


def release_files(directory: Path) -> list[Path]:
    """Those that are in ``directory``."""
    named = [directory / name for name in (GENERATION_CONFIG, "LICENSE", *TOKENIZER_FILES)]
    return [path for path in named if path.is_file()] + sorted(directory.glob("*.py"))


def files_along(tokenizer: Path | None, origin: Path | None) -> list[Path]:
    """Of the origin; with ``--tokenizer`` all of the tokenizer's files are from there.

    Raises:
        UserError: if ``tokenizer`` has none.
    """
    found = [] if origin is None else release_files(origin)
    if tokenizer is None:
        return found
    own = [path for path in release_files(tokenizer) if _is_tokenizers(path)]
    if not own:
        raise UserError(f"--tokenizer {tokenizer} has none of: {', '.join(TOKENIZER_FILES)}")
    return own + [path for path in found if not _is_tokenizers(path)]
