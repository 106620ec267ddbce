"""A flag list as words: the value argparse would keep for a flag, and the list without it."""

from collections.abc import Sequence

from megatron_k2.errors import UserError


def take(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Value of ``--name VALUE`` or ``--name=VALUE`` (the last one), and the other words.

    Raises:
        UserError: where the flag ends the list.
    """
    value, rest, i = None, [], 0
    while i < len(words):
        if words[i] == name:
            if i + 1 == len(words):
                raise UserError(f"{name} needs a value")
            value, i = words[i + 1], i + 2
        elif words[i].startswith(name + "="):
            value, i = words[i].split("=", 1)[1], i + 1
        else:
            rest.append(words[i])
            i += 1
    return value, rest


def last_value(words: Sequence[str], name: str) -> str | None:
    """The value that argparse would keep for ``--name``."""
    return take(words, name)[0]
