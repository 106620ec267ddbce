"""Names of a tokenizer's special tokens, from the two files that may hold them, in any spelling.

transformers (5.24, ``PreTrainedTokenizerBase._from_pretrained``) reads ``special_tokens_map.json``
where ``tokenizer_config.json`` has no ``added_tokens_decoder``, and lets it win there; else the
config alone. Here the other file is asked too where the first has no such token.
"""

import json
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        UserError: if it is anything else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))  # as transformers reads it
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON object ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object but {type(value).__name__}; copy it again")
    return value


def special_token(directory: Path, name: str) -> str | None:
    """The text of token ``name``, such as ``eos_token``; ``None`` where none is named.

    Raises:
        UserError: for a file or an entry that is not readable as one.
    """
    config = directory / CONFIG_FILE
    files = [config, directory / MAP_FILE]
    if "added_tokens_decoder" not in read_object(config):
        files.reverse()
    for path in files:
        if (text := _text(path, name, read_object(path).get(name))) is not None:
            return text
    return None


def token_text(entry: Any) -> str | None:
    """A token is a string, or an AddedToken as an object; ``None`` for what is neither."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


def _text(path: Path, name: str, entry: Any) -> str | None:
    if isinstance(entry, list) and len(entry) == 1:
        entry = entry[0]
    text = token_text(entry)
    if text is None and entry not in (None, ""):
        raise UserError(
            f"{path}: {name} is {entry!r}; one token is expected, as a string or as an object "
            "with 'content'"
        )
    return text
