"""The language model of a release that holds more than one: Kimi K2.5's, and others built alike.

There ``config.json`` has the language model's own under ``text_config``, and its tensors are called
``language_model.model.…`` and ``language_model.lm_head.…`` (the release), or
``model.language_model.…`` beside ``lm_head`` (transformers 5). Vision towers and projectors are
left out, and named.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_k2.checkpoint.hf.quantization import MODULE_LISTS
from megatron_k2.errors import UserError

_OUTER, _INNER = "language_model.", "model.language_model."
_HEAD = "lm_head."
_SAID_FOR_ALL = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
)
"""Keys that a file may say once, outside ``text_config``."""


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's configuration: the whole, or its ``text_config``.

    Raises:
        UserError: if ``text_config`` is no object.
    """
    text = config.get("text_config")
    if text is None:
        return config
    if not isinstance(text, dict):
        raise UserError(f"config.json: text_config={text!r}, expected an object")
    said = {key: config[key] for key in _SAID_FOR_ALL if key in config}
    own = {"architectures": ["DeepseekV3ForCausalLM"]} | said | text
    if isinstance(quantization := own.get("quantization_config"), dict):
        own["quantization_config"] = {
            key: _own_modules(value) if key in MODULE_LISTS else value
            for key, value in quantization.items()
        }
    return own


def _own_modules(listed: Any) -> Any:
    """Modules under the language model's own names; whatever is no list of them as it is."""
    if not isinstance(listed, list):
        return listed
    return [(_own_name(name) or name) if isinstance(name, str) else name for name in listed]


def language_tensors[Value](
    stored: Mapping[str, Value],
) -> tuple[dict[str, Value], tuple[str, ...]] | None:
    """The language model's tensors under their own names, and the names of those left out.

    Returns:
        None for a release that is nothing but a language model.

    Raises:
        UserError: if two tensors would have one name.
    """
    if not any(name.startswith((_OUTER, _INNER)) for name in stored):
        return None
    taken: dict[str, Value] = {}
    left_out: list[str] = []
    for name, value in stored.items():
        own = _own_name(name)
        if own is None:
            left_out.append(name)
        elif own in taken:
            raise UserError(f"'{own}' is in the release twice, one of them as '{name}'")
        else:
            taken[own] = value
    return taken, tuple(left_out)


def _own_name(name: str) -> str | None:
    if name.startswith(_INNER):
        return "model." + name.removeprefix(_INNER)
    if name.startswith(_OUTER):
        return name.removeprefix(_OUTER)
    return name if name.startswith(_HEAD) else None


def listed_parts(left_out: tuple[str, ...]) -> str:
    """Parts of the model that tensors belong to, with their numbers."""
    parts = Counter(name.removeprefix("model.").partition(".")[0] for name in left_out)
    return ", ".join(f"{part} ({number})" for part, number in sorted(parts.items()))
