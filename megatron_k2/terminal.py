"""Tables and lists of names on a terminal, laid out by rich; plain text where they are piped.

In a pipe nothing is coloured, wrapped to a screen that is not there, or cut off. On a screen prose
wraps at its width; a table keeps its own, since a number that is cut off is worse than a line that
the terminal wraps.
"""

from collections.abc import Iterable
from io import StringIO

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table

UNBOUNDED = 10_000
"""Columns of a console that wraps nothing."""


def as_text(*parts: RenderableType, width: int = UNBOUNDED) -> str:
    """``parts`` one below the other as plain text, wrapped at ``width`` columns."""
    content = StringIO()
    console = Console(
        file=content,
        width=width,
        color_system=None,
        force_terminal=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in content.getvalue().splitlines())


def show(*parts: RenderableType) -> None:
    """Print ``parts`` one below the other: on a terminal in colours, as text into a pipe."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        print(as_text(*parts), flush=True)
        return
    screen, unbounded = console.width, console.options.update(width=UNBOUNDED)
    for part in parts:
        is_table = isinstance(part, Table)
        needed = console.measure(part, options=unbounded).maximum if is_table else 0
        console.width = max(screen, needed)
        console.print(part)


def table(*headings: str, title: str | None = None, has_names: bool = True) -> Table:
    """An empty table of numbers, aligned at the right.

    Args:
        *headings: of the columns.
        title: above the table.
        has_names: whether the first column is text, aligned at the left.
    """
    found = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for number, heading in enumerate(headings):
        found.add_column(heading, justify="left" if has_names and not number else "right")
    return found


def pairs(
    rows: Iterable[tuple[str, ...]], indent: int = 2, *, has_numbers: bool = False
) -> Padding:
    """Names and what they stand for, in columns without lines; the last column wraps.

    Args:
        rows: all of one length.
        indent: columns left of them.
        has_numbers: whether the last column is aligned at the right.
    """
    grid = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    if grid.columns and has_numbers:
        grid.columns[-1].justify = "right"
    for column in grid.columns[:-1]:
        column.no_wrap = True
    return Padding(grid, (0, 0, 0, indent), expand=False)
