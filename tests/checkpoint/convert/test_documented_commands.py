"""docs/checkpoints.md's commands, run as they stand there, print what stands there.

Seconds and what depends on the order of sums are not compared; an ellipsis stands for any lines.
"""

import re
import runpy
import shlex
import sys

import pytest

from megatron_k2.cli.convert import main
from tests.support.paths import REPOSITORY

MEASURED = re.compile(
    r"\d\.\d+e[+-]\d\d|\d+\.\d s$|(?<=\|logit\| )[\d.]+|[\d.]+(?=%)", re.MULTILINE
)


def documented():
    """(command, exit code, what it prints) of the first session in the document."""
    text = (REPOSITORY / "docs" / "checkpoints.md").read_text()
    session = re.search(r"```\n(\$ .*?)```", text, re.DOTALL)[1]
    for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
        line, _, output = part.partition("\n")
        command, _, comment = line.partition("#")
        yield command.strip(), int(comment.strip().startswith("exit code 1")), output.strip()


def masked(text):
    """Without what is measured, and as a pattern where lines are left out."""
    return re.escape(without_measures(text)).replace("…", r".*")


def without_measures(text):
    """Where no token differs, nothing is said of how far they are apart."""
    return MEASURED.sub("~", text.partition(", else apart")[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_commands_print_what_the_document_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    commands = list(documented())
    assert len(commands) == 11
    for command, exit_code, expected in commands:
        words = shlex.split(command)
        if words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(REPOSITORY / words[1]), run_name="__main__")
        else:
            assert words[:2] == ["megatron-k2", "convert"]
            assert main(words[2:]) == exit_code, command
        printed = without_measures(capsys.readouterr().out.strip())
        assert re.fullmatch(masked(expected), printed, re.DOTALL), f"{command}\n{printed}"
