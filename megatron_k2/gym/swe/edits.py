"""Edits as a model writes them: fenced blocks that name a file, or a function of one.

    ```python module.py            the whole file
    ```python module.py::function  one function of it, at its top level

What a model wrote is text throughout: it is put into files and never parsed here.
"""

import ast
import re
from collections.abc import Mapping

BLOCK = re.compile(
    r"^```[ \t]*(?:python|py)?[ \t]+([\w./-]+\.py)(?:::(\w+))?[ \t]*\n(.*?)^```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
MOST_CHARACTERS = 1 << 20
"""Of all files together, after the edits."""


class NoEdit(Exception):  # noqa: N818 - what an answer was
    """The answer cannot be applied; the message says why."""


def edited(files: Mapping[str, str], answer: str) -> dict[str, str]:
    """The files after an answer's edits; of two of the same thing the last counts.

    Raises:
        NoEdit: no block, one that names what is not there, or a file both whole and in parts.
    """
    blocks = BLOCK.findall(answer)
    if not blocks:
        raise NoEdit("no fenced block that names a file of the repository")
    edits: dict[str, dict[str, str]] = {}
    for path, function, text in blocks:
        if path not in files:
            raise NoEdit(f"no file {path!r} in the repository; it has {', '.join(files)}")
        edits.setdefault(path, {})[function] = text
    found = {**files, **{path: _edited(files[path], parts) for path, parts in edits.items()}}
    if sum(map(len, found.values())) > MOST_CHARACTERS:
        raise NoEdit(f"more than {MOST_CHARACTERS} characters")
    return found


def _edited(source: str, parts: dict[str, str]) -> str:
    if "" in parts:
        if len(parts) > 1:
            raise NoEdit("a file given whole, and functions of it beside; give one of both")
        return parts[""]
    lines = source.splitlines(keepends=True)
    # From the last to the first, so that lines before an edit keep their numbers.
    for (first, last), text in sorted(
        ((span(source, name), text) for name, text in parts.items()), reverse=True
    ):
        lines[first:last] = [text.rstrip("\n") + "\n"]
    return "".join(lines)


def span(source: str, name: str) -> tuple[int, int]:
    """First and last line, counted from 0 and exclusive, of a function at the top level.

    Raises:
        NoEdit: none of that name.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            return first - 1, node.end_lineno or node.lineno
    raise NoEdit(f"no function {name!r} at the top level of that file")


def function_text(source: str, name: str) -> str:
    """A function as it stands."""
    first, last = span(source, name)
    return "".join(source.splitlines(keepends=True)[first:last])


def with_function(source: str, name: str, text: str) -> str:
    """A file of ours with one function's text replaced."""
    return _edited(source, {name: text})


def as_edit(path: str, name: str, text: str) -> str:
    """An answer that replaces one function."""
    return f"```python {path}::{name}\n{text.rstrip()}\n```"
