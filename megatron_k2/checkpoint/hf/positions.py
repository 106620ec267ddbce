"""Rotary base and YaRN of a ``config.json``, from the keys of the releases or of transformers 5.

The releases say ``rope_theta`` and ``rope_scaling``, transformers 5 writes both into
``rope_parameters``. Where a file has both, they must agree: readers differ in which they prefer.
"""

import math
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.presets import YarnScaling

_KINDS = ("type", "rope_type")
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
"""Of DeepSeek's modeling code."""
_YARN_REQUIRED = ("factor", "original_max_position_embeddings")
_LARGEST = 1e30
_NEUTRAL = {"truncate": True, "partial_rotary_factor": 1}
"""Value at which a key asks for what is done anyway."""


def rotary_positions(config: dict[str, Any]) -> tuple[float, YarnScaling | None]:
    """Rotary base and YaRN's numbers, None for plain rotary embedding.

    Raises:
        UserError: naming the key that is missing, of another type, contradicted by another, or
            asks for what Megatron does not compute.
    """
    classic, modern = (_object(config, key) for key in ("rope_scaling", "rope_parameters"))
    theta = _rotary_base(config, classic, modern)
    readings = [
        _yarn(name, said, config)
        for name, said in (classic, modern)
        if said.keys() - {"rope_theta"}
    ]
    if len(readings) == 2 and readings[0] != readings[1]:
        raise UserError(
            f"config.json: rope_scaling={classic[1]!r} and rope_parameters={modern[1]!r} "
            "contradict each other; leave the wrong one out"
        )
    return theta, readings[0] if readings else None


def _object(config: dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    said = config.get(key)
    if said is None:
        return key, {}
    if not isinstance(said, dict):
        raise UserError(f"config.json: {key}={said!r}, expected an object")
    if nested := [name for name, value in said.items() if isinstance(value, dict)]:
        raise UserError(
            f"config.json: {key} has an object of its own for {', '.join(nested)}; supported is "
            "one for all layers"
        )
    return key, said


def _number(where: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:  # NaN is not either
        raise UserError(f"config.json: {where}={value!r}, expected a number")
    return float(value)


def _rotary_base(config: dict[str, Any], *objects: tuple[str, dict[str, Any]]) -> float:
    places = [("rope_theta", config), *((f"{n}.rope_theta", said) for n, said in objects)]
    said = {
        where: _number(where, place["rope_theta"])
        for where, place in places
        if place.get("rope_theta") is not None
    }
    if not said:
        raise UserError(
            "config.json has neither rope_theta nor rope_parameters; a config re-saved by "
            "transformers 5 may have lost it: take the release's own"
        )
    if len(set(said.values())) > 1:
        listed = " and ".join(f"{where}={value:g}" for where, value in said.items())
        raise UserError(f"config.json: {listed} contradict each other; leave the wrong one out")
    theta = next(iter(said.values()))
    if theta != int(theta) or theta <= 1:
        raise UserError(
            f"config.json: rope_theta={theta}; Megatron's flag takes whole numbers above 1"
        )
    return theta


def _yarn(name: str, said: dict[str, Any], config: dict[str, Any]) -> YarnScaling | None:
    kinds = {said[key] for key in _KINDS if isinstance(said.get(key), str)} or {"default"}
    if any(said.get(key) is not None and not isinstance(said[key], str) for key in _KINDS):
        raise UserError(f"config.json: {name}={said!r}, expected a type in words")
    kind = " and ".join(sorted(kinds))
    if kind not in ("default", "yarn"):
        raise UserError(f"config.json: {name} of type '{kind}'; supported is 'yarn' or none")
    known = {*_KINDS, "rope_theta", "attention_factor"}
    if kind == "yarn":
        known |= {*_YARN_REQUIRED, *_YARN_DEFAULTS, "finetuned"}
    for key, value in said.items():
        if key not in known and value is not None and value != _NEUTRAL.get(key):
            raise UserError(
                f"config.json: {name}.{key}={value!r} is not supported with type '{kind}'; "
                f"supported are {', '.join(sorted(known))}"
            )
    if kind == "default":
        _require_attention_factor(name, said, 1.0)
        return None
    if missing := [key for key in _YARN_REQUIRED if said.get(key) is None]:
        raise UserError(f"config.json: {name} lacks {', '.join(sorted(missing))}")
    yarn = _yarn_numbers(name, said)
    outside = config.get("original_max_position_embeddings")
    if outside not in (None, yarn.original_max_position_embeddings):
        raise UserError(
            f"config.json: original_max_position_embeddings={outside!r} and that of {name}, "
            f"{yarn.original_max_position_embeddings}, contradict each other"
        )
    _require_attention_factor(name, said, _rotary_length(yarn))
    return yarn


def _yarn_numbers(name: str, said: dict[str, Any]) -> YarnScaling:
    given = _YARN_DEFAULTS | {key: value for key, value in said.items() if value is not None}
    numbers = {key: _number(f"{name}.{key}", given[key]) for key in _YARN_DEFAULTS}
    factor, original = (_number(f"{name}.{key}", given[key]) for key in _YARN_REQUIRED)
    if factor < 1 or original < 1 or original != int(original):
        raise UserError(
            f"config.json: {name}.factor={factor:g}, original_max_position_embeddings="
            f"{original:g}; expected 1 or more, the second a whole number"
        )
    if min(numbers["beta_fast"], numbers["beta_slow"]) <= 0:
        raise UserError(f"config.json: {name}={said!r}, expected beta_fast and beta_slow above 0")
    return YarnScaling(
        rotary_scaling_factor=factor, original_max_position_embeddings=int(original), **numbers
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _rotary_length(yarn: YarnScaling) -> float:
    """What YaRN multiplies cosine and sine by: DeepSeek's rule, which is Megatron's."""
    factor = yarn.rotary_scaling_factor
    return _mscale(factor, yarn.mscale) / _mscale(factor, yarn.mscale_all_dim)


def _require_attention_factor(name: str, said: dict[str, Any], computed: float) -> None:
    """Refuse a factor of cosine and sine that is not what Megatron computes from the others.

    transformers takes the factor from the file; without it, its rule is DeepSeek's only where
    ``mscale`` and ``mscale_all_dim`` are both given and not 0, else ``0.1 ln(factor) + 1``.
    """
    given = said.get("attention_factor")
    if given is not None:
        expected = _number(f"{name}.attention_factor", given)
        what = f"{name}.attention_factor={given!r}"
    elif said.get("factor") is None or (said.get("mscale") and said.get("mscale_all_dim")):
        return
    else:
        expected = _mscale(said["factor"], 1.0)
        what = (
            f"{name} with mscale={said.get('mscale')!r} and mscale_all_dim="
            f"{said.get('mscale_all_dim')!r}, by which transformers scales by {expected:.6g},"
        )
    if not math.isclose(expected, computed, rel_tol=1e-9):
        raise UserError(
            f"config.json: {what} is not what Megatron computes from factor, mscale and "
            f"mscale_all_dim ({computed:.6g})"
        )
