"""Tables where they are piped and on a narrow screen."""

import pytest
from rich.console import Console

from megatron_k2 import terminal
from megatron_k2.terminal import as_text, pairs, show, table

LONG = "[red]source[/red] :smile: " + "x" * 300


def wide():
    found = table("name", *(f"column {i}" for i in range(30)))
    found.add_row("a", *(f"{1_000_000 + i:,}" for i in range(30)), style="red")
    return found


def test_a_pipe_gets_every_character_and_no_colour(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = as_text(wide(), pairs([("label", LONG)]))
    assert LONG in text
    assert all(f"{1_000_000 + i:,}" in text for i in range(30))
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_text_of_a_given_width_wraps_below_its_own_column():
    lines = as_text(pairs([("label", "word " * 20)], indent=0), width=40).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(" " * len("label  ")) for line in lines[1:])


@pytest.mark.parametrize("columns", [40, 500])
def test_a_narrow_terminal_cuts_no_number_off(monkeypatch, capsys, columns):
    def screen(**options):
        return Console(force_terminal=True, color_system="standard", width=columns, **options)

    monkeypatch.setattr(terminal, "Console", screen)
    show("prose " * 30, wide())
    text = capsys.readouterr().out
    assert all(f"{1_000_000 + i:,}" in text for i in range(30))
    assert "…" not in text
    assert max(map(len, text[: text.index("name")].splitlines()[:3])) <= columns
