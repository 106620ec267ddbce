"""``quantization_config``: what a release may say in it, and what an FP8 export says.

An export is quantised as its source was: the same keys, the same modules left alone, scales that
are powers of two where the source says so (``scale_fmt`` ``ue8m0``, DeepSeek-V3.1).
"""

import re
from dataclasses import dataclass
from typing import Any

from megatron_k2.checkpoint.block_fp8.layout import QUANTIZATION_CONFIG, is_quantized
from megatron_k2.checkpoint.hf import packed_int4
from megatron_k2.errors import UserError

_REQUIRED = {key: QUANTIZATION_CONFIG[key] for key in ("quant_method", "weight_block_size", "fmt")}
_VALUES: dict[str, tuple[Any, ...]] = {
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8", None),
    "dequantize": (False, True, None),  # a wish to the loader
}
MODULE_LISTS = ("modules_to_not_convert", "ignored_layers")
"""By transformers' name and by another that it takes."""

_LONGEST_PATTERN, _MOST_CHOICES, _MOST_ALTERNATIVES = 256, 3, 16
"""Characters of an expression; repeats and groups in it; bars."""


@dataclass(frozen=True)
class BlockFp8:
    """How an FP8 export is quantised."""

    config: dict[str, Any]
    """``quantization_config`` of the export."""

    @property
    def has_power_of_two_scales(self) -> bool:
        """Whether every scale is a power of two."""
        return self.config.get("scale_fmt") == "ue8m0"

    def quantizes(self, hf_name: str) -> bool:
        """Whether a Hugging Face tensor is stored as FP8.

        A listed module is left alone by transformers' rule (``should_convert_module``): its name
        begins with the entry, as a regular expression that ends at a dot, or ends in it.
        """
        module = hf_name.removesuffix(".weight")
        return is_quantized(hf_name) and not any(
            re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(entry)
            for key in MODULE_LISTS
            for entry in self.config.get(key) or ()
        )


def require_known(said: Any) -> None:
    """Refuse a ``quantization_config`` that is neither block FP8 nor int4 as the releases have it.

    Raises:
        UserError: naming the key that is not supported.
    """
    if said is None or said == {}:
        return
    if not isinstance(said, dict):
        raise UserError(f"config.json: quantization_config={said!r}, expected an object")
    if said.get("quant_method") == packed_int4.METHOD:
        packed_int4.group_size_of(said)
        return
    found = {"fmt": _REQUIRED["fmt"]} | said
    if any(found.get(key) != value for key, value in _REQUIRED.items()):
        listed = ", ".join(f"{key}={found.get(key)!r}" for key in _REQUIRED)
        raise UserError(f"config.json: quantization_config has {listed}; supported is {_REQUIRED}")
    for key, value in said.items():
        if key in MODULE_LISTS:
            _require_patterns(key, value)
        elif key in _VALUES and value not in _VALUES[key]:
            expected = " or ".join(repr(known) for known in _VALUES[key])
            raise UserError(
                f"config.json: quantization_config.{key}={value!r}, supported is {expected}"
            )
        elif key not in _VALUES and key not in _REQUIRED and value not in (None, [], {}):
            raise UserError(
                f"config.json: quantization_config.{key}={value!r} is not known; if it says "
                "nothing about how the weights are stored, leave it out"
            )


def _is_quick(entry: str) -> bool:
    """Whether trying an expression takes a bounded time, whoever wrote it.

    Python's engine tries every way to split a text between repeats and between the alternatives of
    groups: with three of them, none around another, some ten thousand for the name of a module.
    """
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", entry)  # escapes and classes are one character each
    bare = bare.replace("(?:", "(")
    has_more = "(?" in bare or re.search(r"\)[*+?{]", bare) or re.search(r"\\[1-9]", entry)
    num_repeats, num_groups = len(re.findall(r"[*+?{]", bare)), bare.count("(")
    num_choices = num_repeats + max(num_groups, "|" in bare)
    is_short = len(entry) <= _LONGEST_PATTERN and bare.count("|") <= _MOST_ALTERNATIVES
    return is_short and num_choices <= _MOST_CHOICES and not has_more


def _require_patterns(key: str, value: Any) -> None:
    for entry in value if isinstance(value, list) else () if value is None else (value,):
        try:
            if not isinstance(value, list):
                raise TypeError
            re.compile(entry)
            if not _is_quick(entry):
                raise UserError(
                    f"config.json: quantization_config.{key} has {entry[:60]!r}..., an expression "
                    f"that could take for ever; expected a module's name, or at most "
                    f"{_MOST_CHOICES} repeats and groups, none around another"
                )
        except (re.error, TypeError):
            raise UserError(
                f"config.json: quantization_config.{key} has {entry!r}; expected a list of "
                "modules' names"
            ) from None


def quantization_like(source_config: dict[str, Any] | None) -> BlockFp8:
    """As the source was quantised if it was in block FP8, else as K2's release."""
    said = (source_config or {}).get("quantization_config")
    require_known(said)
    if not said or said["quant_method"] == packed_int4.METHOD:
        return BlockFp8(QUANTIZATION_CONFIG)
    return BlockFp8(said)
