"""The defects listed in docs/muonclip.md name tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| [^|]+ \| ((?:`test_\w+`[^|`]*)+) \|$", re.MULTILINE)


def _named(text):
    return [name for cell in ROW.findall(text) for name in re.findall(r"`(test_\w+)`", cell)]


def test_every_defect_listed_has_its_test():
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = _named((ROOT / "docs" / "muonclip.md").read_text())
    assert len(named) >= 19
    assert not set(named) - defined


def test_a_name_that_no_test_has_would_be_seen():
    assert _named("| a defect | `test_of_nothing_at_all` |") == ["test_of_nothing_at_all"]
