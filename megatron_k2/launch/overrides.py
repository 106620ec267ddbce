"""``--set a.b=c``: one value of a recipe changed, by the name it has in the dataclass."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.rl_plan import check_phases, trainer_reserved_gb
from megatron_k2.planning.memory_fit import fit_to_memory

FIXED = {
    "name",
    "sources",
    "differences",
    "previous",
    "imported",
    "precision",
    "layout.preset",
    "layout.modules",
    "layout.gpu",
    "layout.seq_length",
    "layout.sequences_per_step",
    "layout.etp",
    "layout.pipeline_layout",
    "layout.split",
    "phase.name",
    "phase.source",
}
"""Not to be set: what names the recipe, what follows from the phase, what is not planned."""

ELEMENTS: dict[str, Callable[[str], Any]] = {
    "data.weights": float,
    "loss.iterations_to_skip": int,
    "profiler.ranks": int,
}
"""Key -> type of a list's elements, where they are not text."""


def settable(recipe: Recipe) -> dict[str, Any]:
    """Every key of ``--set`` and its value, dotted."""
    return {key: value for key, value in _leaves(recipe, "") if key not in FIXED}


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in fields(node):
        key, value = prefix + field.name, getattr(node, field.name)
        if is_dataclass(value) and key not in FIXED:
            yield from _leaves(value, key + ".")
        else:
            yield key, value


def apply(recipe: Recipe, assignments: list[str], *, force: bool = False) -> Recipe:
    """``recipe`` with every ``a.b=c`` applied, in order.

    Args:
        recipe: unchanged.
        assignments: as typed.
        force: keep a layout that the planner says does not fit.

    Raises:
        UserError: for an unknown key (naming the nearest), a value of another type, or a layout
            that does not fit.
    """
    known = settable(recipe)
    changes: dict[str, dict[str, Any]] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected KEY=VALUE")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"one of: {', '.join(known)}"
            raise UserError(f"--set {key}: no such key; {hint}")
        part, _, name = key.rpartition(".")
        changes.setdefault(part, {})[name] = _parsed(key, value, known[key])
    return _rebuilt(recipe, changes, force=force)


def _rebuilt(recipe: Recipe, changes: dict[str, dict[str, Any]], *, force: bool) -> Recipe:
    if not changes:
        return recipe
    values = _changed(recipe, changes, "")
    phase = values.get("phase", recipe.phase)
    layout = replace(
        values.get("layout", recipe.layout),
        seq_length=phase.seq_length,
        sequences_per_step=phase.sequences_per_step,
    )
    layout.check()
    found = recipe.replace(**{**values, "layout": layout})
    if force or recipe.is_cpu:
        return found
    if layout != recipe.layout:
        typed = {"activation_offload", "optimizer_offload"} & set(changes.get("layout", {}))
        fitting = fit_to_memory(layout, trainer_reserved_gb(found), frozenset(typed))
        found = found.replace(layout=fitting)
    check_phases(found)
    return found


def _changed(node: Any, changes: dict[str, dict[str, Any]], prefix: str) -> dict[str, Any]:
    """The fields of ``node`` that are other ones, those of the parts below it included."""
    values = dict(changes.get(prefix, {}))
    for field in fields(node):
        part = f"{prefix}.{field.name}".lstrip(".")
        if any(f"{key}.".startswith(f"{part}.") for key in changes):
            below = getattr(node, field.name)
            values[field.name] = replace(below, **_changed(below, changes, part))
    return values


def _parsed(key: str, text: str, now: Any) -> Any:
    """``text`` as a value of ``now``'s type; lists are separated by commas."""
    try:
        if isinstance(now, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(now, int):
            return int(text.replace("_", ""))
        if isinstance(now, float):
            return float(text)
    except (ValueError, KeyError):
        kind = "true or false" if isinstance(now, bool) else f"a number like {now!r}"
        raise UserError(f"--set {key}={text}: expected {kind}") from None
    if isinstance(now, (tuple, frozenset)):
        words = [word for word in text.split(",") if word]
        return type(now)(_element(key, word) for word in words)
    return text


def _element(key: str, word: str) -> Any:
    kind = ELEMENTS.get(key, str)
    try:
        return kind(word)
    except ValueError:
        raise UserError(f"--set {key}: '{word}' is not a number") from None
