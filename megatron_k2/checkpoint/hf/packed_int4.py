"""Weights in packed int4, as Kimi K2-Thinking and K2.5 have their experts: read as what they mean.

``pack-quantized`` of compressed-tensors, symmetric, a scale for each run of columns of a row:

    X.weight_packed  [out, in / 8] int32: eight integers of four bits, the first in the lowest bits,
                     each with 8 added, so that -8 to 7 is stored as 0 to 15
    X.weight_scale   [out, in / group] bf16
    X.weight_shape   [2] integers: out, in; what the other two say already

    W = integer × scale, rounded to the scale's dtype

Source: compressed-tensors 0.20, its ``pack_to_int32`` and ``dequantize``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_k2.checkpoint.stream.rows import WEIGHTS, Dtype, Rows
from megatron_k2.errors import UserError

METHOD = "compressed-tensors"
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
PER_WORD = 8
"""Integers in an int32."""

_INTEGERS = np.arange(-8, 8, dtype=np.float32)
_CACHED_ELEMENTS = 1 << 16

_SAID: dict[str, tuple[Any, ...]] = {
    "quant_method": (METHOD,),
    "format": ("pack-quantized",),
    "quantization_status": ("compressed", "frozen", None),
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "strategy": ("group",),
    "symmetric": (True,),
    "actorder": (None, "static", False),
    "dynamic": (False, None),
    "block_structure": (None,),
    "zp_dtype": (None,),
    "scale_dtype": (None, "torch.bfloat16"),
}
_HARMLESS = {"ignore", "global_compression_ratio", "version", "config_groups"}
_HARMLESS_OF_WEIGHTS = {"group_size", "observer", "observer_kwargs"}
_GROUP: dict[str, tuple[Any, ...]] = {
    "input_activations": (None,),
    "output_activations": (None,),
    "format": ("pack-quantized", None),
}
_HARMLESS_OF_GROUP = {"targets", "weights"}
UNPACK_FIRST = "dequantise it to bf16 first, or take a bf16 or block FP8 release"


def group_size_of(said: dict[str, Any]) -> int:
    """Columns that share a scale, of a ``quantization_config`` of compressed-tensors.

    Raises:
        UserError: naming what is not read.
    """
    _require(said, _SAID, _HARMLESS, "quantization_config")
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unread("config_groups", groups)
    sizes = set()
    for name, group in groups.items():
        at = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise _unread(at, group)
        if not isinstance(group.get("weights"), dict):
            raise _unread(f"{at}.weights", group.get("weights"))
        _require(group, _GROUP, _HARMLESS_OF_GROUP, at)
        _require(group["weights"], _WEIGHTS, _HARMLESS_OF_WEIGHTS, f"{at}.weights")
        size = group["weights"].get("group_size")
        if type(size) is not int or size <= 0 or size % PER_WORD:
            raise _unread(f"{at}.weights.group_size", size)
        sizes.add(size)
    if len(sizes) > 1:
        raise _unread("config_groups with group_size", sorted(sizes))
    return sizes.pop()


def _require(
    said: dict[str, Any], known: dict[str, tuple[Any, ...]], harmless: set[str], at: str
) -> None:
    must = {"num_bits", "type", "strategy", "symmetric", "format", "quant_method"} & known.keys()
    for key in sorted(must | said.keys(), key=str):
        value = said.get(key)
        is_read = any(type(value) is type(one) and value == one for one in known.get(key, ()))
        if key not in harmless and not is_read:
            raise _unread(f"{at}.{key}", value)


def _unread(key: str, value: Any) -> UserError:
    return UserError(
        f"config.json: quantization_config is {METHOD} with {key}={value!r:.80}; read is int4 as "
        f"K2-Thinking has it (pack-quantized, symmetric, a scale for a group of columns); "
        f"{UNPACK_FIRST}"
    )


@dataclass(frozen=True)
class PackedWeight[Stored]:
    """What a weight is made of."""

    packed: Stored
    scale: Stored
    shape: Stored | None
    group_size: int


def find_packed[Stored](
    stored: Mapping[str, Stored], group_size: int
) -> dict[str, PackedWeight[Stored]]:
    """Weights that ``stored`` has in parts, by the name of the whole.

    Raises:
        UserError: if a scale is missing.
    """
    found = {}
    for name, packed in stored.items():
        if not name.endswith(PACKED):
            continue
        at = name.removesuffix(PACKED)
        if (scale := stored.get(at + SCALE)) is None:
            raise UserError(f"'{name}' is packed, but its scales '{at}{SCALE}' are missing")
        found[f"{at}.weight"] = PackedWeight(packed, scale, stored.get(at + SHAPE), group_size)
    return found


def shape_of(name: str, packed: Any, scale: Any, group_size: int) -> tuple[int, int]:
    """[out, in] of a weight, from where its parts lie (``reader.HfTensor``).

    Raises:
        UserError: naming the weight, if they do not go together.
    """
    if len(packed.shape) == len(scale.shape) == 2:
        rows, columns = scale.shape[0], scale.shape[1] * group_size
        fits = packed.shape == (rows, columns // PER_WORD)
        if fits and packed.dtype is Dtype.INT32 and scale.dtype in WEIGHTS:
            return rows, columns
    raise UserError(
        f"'{name}': packed {packed.dtype} {list(packed.shape)} with scales {scale.dtype} "
        f"{list(scale.shape)}; of groups of {group_size} columns the first is int32 with "
        f"{group_size // PER_WORD} times as many columns as the second, a float"
    )


def unpacked(packed: Rows, scale: Rows, group_size: int) -> Rows:
    """Rows of the weight, [r, in], in the dtype of the scale.

    Args:
        packed: [r, in / 8] int32.
        scale: [r, in / group_size], a dtype of ``WEIGHTS``.
        group_size: columns of a scale.
    """
    rows, columns = packed.shape[0], scale.shape[1] * group_size
    made = np.empty((rows, columns), scale.dtype.numpy)
    step = max(1, _CACHED_ELEMENTS // max(1, columns))
    for begin in range(0, rows, step):
        some = slice(begin, begin + step)
        _unpack(made[some], packed.bits[some], Rows(scale.bits[some], scale.dtype))
    return Rows(made, scale.dtype)


def _unpack(made: np.ndarray, packed: np.ndarray, scale: Rows) -> None:
    """Fill rows that fit in the cache: each integer looks up what it means in its group."""
    of_groups = scale.to(Dtype.FP32).bits.reshape(-1, 1)
    # One rounding of an exact product, as it is defined.
    meant = Rows(of_groups * _INTEGERS, Dtype.FP32).to(scale.dtype).bits.reshape(-1)
    pairs = np.ascontiguousarray(packed).view(np.uint8).reshape(len(of_groups), -1)
    first = np.arange(0, len(meant), len(_INTEGERS), dtype=np.intp)[:, None]
    places = np.empty((*pairs.shape, 2), np.intp)
    np.add(first, pairs & 15, out=places[..., 0])
    np.add(first, pairs >> 4, out=places[..., 1])
    np.take(meant, places.reshape(-1), out=made.reshape(-1), mode="clip")  # all are in range
