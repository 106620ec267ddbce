"""The campaign's short form, and that it sees a lost file. The full one prints a table."""

import pytest

from tests.campaigns import sigkill


@pytest.mark.slow
def test_nothing_is_lost_by_a_kill(capsys):
    assert (
        sigkill.main("--seed 1 --kills 2 --only convert-import data-prepare data-chat".split()) == 0
    )
    assert capsys.readouterr().out.count("0 lost") == 4


def test_a_lost_file_would_be_seen(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same").write_text("x")
    assert sigkill.files_differ(tmp_path / "a", tmp_path / "b") == ""
    (tmp_path / "a" / "same").write_text("y")
    assert sigkill.files_differ(tmp_path / "a", tmp_path / "b") == "same differs"
    (tmp_path / "b" / "more").write_text("x")
    assert "more" in sigkill.files_differ(tmp_path / "a", tmp_path / "b")
