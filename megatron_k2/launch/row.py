"""A line of a launch's table, and where a value of a recipe is from."""

from dataclasses import dataclass

from megatron_k2.launch.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """A line: what, its value, where it is from."""

    label: str
    value: str
    source: str = ""


def source_of(recipe: Recipe, key: str) -> str:
    """Where the value of ``key`` is from: its own source, or its part's.

    Raises:
        KeyError: where a recipe gives none.
    """
    sources = dict(recipe.sources)
    return sources[key] if key in sources else sources[key.split(".")[0]]
