"""Megatron's parser, which raises what it would print.

Its usage is eight hundred flags long, and while a rank's output goes to a log file nobody sees the
sentence behind it.
"""

import argparse
import difflib
from collections.abc import Callable
from typing import NoReturn

from megatron_k2.errors import UserError

Declare = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
"""Megatron's ``extra_args_provider``."""
_UNKNOWN = "unrecognized arguments: "


def refusing(declare: Declare) -> Declare:
    """``declare``, after which the parser raises ``UserError`` instead of ending the process."""

    def declared(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = declare(parser)

        def refuse(message: str) -> NoReturn:
            raise UserError(message + _nearest(parser, message))

        parser.error = refuse  # type: ignore[method-assign]
        return parser

    return declared


def _nearest(parser: argparse.ArgumentParser, message: str) -> str:
    """The flag that was meant, as far as that can be told."""
    if not message.startswith(_UNKNOWN):
        return ""
    first = message.removeprefix(_UNKNOWN).split()[0].split("=")[0]
    if not first.startswith("-"):
        return "; a flag before it takes no value, or fewer"
    known = list(parser._option_string_actions)
    near = difflib.get_close_matches(first, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
