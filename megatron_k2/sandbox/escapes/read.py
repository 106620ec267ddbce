"""Programs of the suite and of users, from their files to records."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.records.read import read_json_line

MUST = ("blocked", "killed", "allowed")


@dataclass(frozen=True)
class Escape:
    """A program, and what a sandbox must do with it."""

    name: str
    code: str
    must: str
    """``blocked``: it may end as it likes, but not get out. ``killed``: it must be ended, or fail.
    ``allowed``: it must not be hindered."""

    def __post_init__(self) -> None:
        if self.must not in MUST:
            raise UserError(f"{self.name}: must is {self.must!r}; expected {', '.join(MUST)}")


def suite_text() -> str:
    """The suite's file; its hash names what a verdict was given on."""
    return files("megatron_k2.sandbox.escapes").joinpath("programs.txt").read_text("utf-8")


def suite() -> list[Escape]:
    """Our own programs, in the order of the file."""
    _, *parts = suite_text().split("\n## ")
    prelude, *programs = (_titled(part) for part in parts)
    return [Escape(name, prelude[2] + code, must) for name, must, code in programs]


def _titled(part: str) -> tuple[str, str, str]:
    title, _, code = part.partition("\n")
    name, must = title.split()
    return name, must, code.strip("\n") + "\n"


def escapes_in(path: Path) -> list[Escape]:
    """A user's programs: a JSON object a line, with the strings name, code and must.

    Raises:
        UserError: no such file, a line that is not such an object, a name twice.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected JSON lines: name, code, must")
    found: dict[str, Escape] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.isspace() or not line:
            continue
        try:
            row = read_json_line(line)
            name, code, must = (_string(row, key) for key in ("name", "code", "must"))
            escape = Escape(name, code, must)
        except ValueError as problem:
            raise UserError(f"{path}:{number}: {problem}") from None
        if escape.name in found:
            raise UserError(f"{path}:{number}: a program named {escape.name!r} was there before")
        found[escape.name] = escape
    if not found:
        raise UserError(f"{path} holds no program")
    return list(found.values())


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__}; expected a string")
    return value
