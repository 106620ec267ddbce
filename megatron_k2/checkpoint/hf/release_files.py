"""What goes along with a model, in either direction, beside its weights and ``config.json``.

Copied as it is and never run: tokenizer files, chat templates, generation and processor configs,
licences and notices, and the code files that ``auto_map`` in ``config.json`` names.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from megatron_k2.chat.control import CHAT_TOKENS
from megatron_k2.chat.jinja import jinja_template
from megatron_k2.checkpoint.hf.downloads import require_file
from megatron_k2.data.special_tokens import read_object, token_text
from megatron_k2.errors import UserError

GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "tiktoken.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""A tokenizer's files by fixed names."""

_TOKENIZERS = re.compile(
    r"tokenization_.*|chat_template.*\.(jinja|json)|additional_chat_templates/[^/]+\.jinja"
)
"""Its other files: code, and templates by transformers' and others' names."""

_TEMPLATES = re.compile(r"chat_template.*|additional_chat_templates/.*")

_OTHERS = re.compile(
    rf"{re.escape(GENERATION_CONFIG)}|(.*_)?(pre)?processor_config\.json|[^/]+\.py"
    r"|(?i:licen[cs]e|notice|third[_-]party|copying)[^/]*"
)


def _is_tokenizers(name: Path) -> bool:
    return str(name) in TOKENIZER_FILES or _TOKENIZERS.fullmatch(name.as_posix()) is not None


def release_files(directory: Path) -> dict[Path, Path]:
    """The files beside the weights that ``directory`` has: name below it -> where it lies.

    Raises:
        UserError: for one that is a link to nothing or a pointer of Git LFS.
    """
    found: dict[Path, Path] = {}
    for path in (*directory.glob("*"), *directory.glob("additional_chat_templates/*")):
        name = path.relative_to(directory)
        if path.is_dir() or not (_is_tokenizers(name) or _OTHERS.fullmatch(name.as_posix())):
            continue
        require_file(path, is_text=True)
        found[name] = path
    return dict(sorted(found.items()))


def files_along(tokenizer: Path | None, source_release: Path | None) -> dict[Path, Path]:
    """Files to copy beside an export: the release's, but the tokenizer's from ``tokenizer``.

    Raises:
        UserError: if ``tokenizer`` has none.
    """
    found = {} if source_release is None else release_files(source_release)
    if tokenizer is None:
        return found
    own = {name: path for name, path in release_files(tokenizer).items() if _is_tokenizers(name)}
    if not own:
        raise UserError(f"--tokenizer {tokenizer} has none of: {', '.join(TOKENIZER_FILES)}")
    return own | {name: path for name, path in found.items() if not _is_tokenizers(name)}


def own_chat_template(files: dict[Path, Path]) -> str | None:
    """Our template as Jinja, where a tokenizer knows K2's chat tokens and brings no template.

    Args:
        files: Those that go along; a release's own template stays as it is.
    """
    if any(_TEMPLATES.fullmatch(name.as_posix()) for name in files):
        return None
    names = (Path("tokenizer_config.json"), Path("tokenizer.json"))
    found = [_object(files[name]) for name in names if name in files]
    if any("chat_template" in each for each in found):
        return None
    added = [token for each in found for token in _added_tokens(each)]
    return jinja_template() if set(CHAT_TOKENS) <= set(added) else None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty for what is none, for such a file is copied as it is."""
    try:
        return read_object(path)
    except UserError:
        return {}


def _added_tokens(config: dict[str, Any]) -> list[str | None]:
    """Contents of ``tokenizer.json``'s list or ``tokenizer_config.json``'s object."""
    listed, decoder = config.get("added_tokens"), config.get("added_tokens_decoder")
    found = [*(listed if isinstance(listed, list) else [])]
    found += decoder.values() if isinstance(decoder, dict) else []
    return [token_text(entry) for entry in found]


def copy_files(files: dict[Path, Path], target: Path) -> None:
    """Copy contents to the same names below ``target``."""
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
