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
"""A tokenizer's files by fixed names; its code, ``tokenization_*.py``, is matched by pattern."""


def _is_tokenizers(path: Path) -> bool:
    return path.name in TOKENIZER_FILES or path.name.startswith("tokenization_")


def release_files(directory: Path) -> list[Path]:
    """The files beside the weights that ``directory`` has, in a fixed order."""
    named = [directory / name for name in (GENERATION_CONFIG, "LICENSE", *TOKENIZER_FILES)]
    return [path for path in named if path.is_file()] + sorted(directory.glob("*.py"))


def files_along(tokenizer: Path | None, source_release: Path | None) -> list[Path]:
    """Files to copy beside an export: the release's, but the tokenizer's from ``tokenizer``.

    Raises:
        UserError: if ``tokenizer`` has none.
    """
    found = [] if source_release is None else release_files(source_release)
    if tokenizer is None:
        return found
    own = [path for path in release_files(tokenizer) if _is_tokenizers(path)]
    if not own:
        raise UserError(f"--tokenizer {tokenizer} has none of: {', '.join(TOKENIZER_FILES)}")
    return own + [path for path in found if not _is_tokenizers(path)]
