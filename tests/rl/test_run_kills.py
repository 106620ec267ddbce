"""A whole run killed and started again; ``tests/campaigns/rl_sigkill.py`` does it twenty times."""

import shutil

import pytest

from megatron_k2.run.iterations import TRACKER
from tests.campaigns import rl_sigkill


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    assert rl_sigkill.campaign(2, 3, tmp_path, iterations=4) == []
    whole, other = tmp_path / "whole" / "out", tmp_path / "other"
    shutil.copytree(whole, other)
    (other / TRACKER).write_text("2")
    assert "tensors differ" in rl_sigkill.differ(other, whole), "an earlier checkpoint is seen"
    journal = other / rl_sigkill.FOLDER / rl_sigkill.LEDGER / rl_sigkill.JOURNAL
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(line for line in lines if '"iteration":2' not in line) + "\n")
    assert rl_sigkill.differ(other, whole) == "trained on other answers in iteration 2"
