"""Killed twenty times, a run trains on what the undisturbed run trains on, bit for bit.

The engine's answers hang on the learner's weights, and these on every byte that was trained on. Not
exercised: a machine that loses power, which may lose what was written and not synced.
"""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from megatron_k2.rl.ledger import Ledger
from tests.rl.learning import CHECKPOINT, NUM_ITERATIONS, RESULT, TRAINED, learn
from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    learn(folder)
    return result(folder)


def result(folder):
    return json.loads((folder / RESULT).read_text()), lines(folder)


def lines(folder):
    return [tuple(line.split()) for line in (folder / TRAINED).read_text().splitlines()]


def test_twenty_kills_change_nothing(tmp_path, undisturbed):
    words = [sys.executable, "-m", "tests.rl.learning", tmp_path, "0.1", "20", "1"]
    ended = subprocess.run(
        [str(word) for word in words], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.splitlines()[-1]) == 20, ended.stdout
    expected, handed_out = undisturbed
    found, again = result(tmp_path)
    assert found["weights"] == expected["weights"]
    assert Counter(map(tuple, found["trained"])) == Counter(map(tuple, expected["trained"]))
    assert len(again) > len(handed_out)  # some were handed out again, and were the same
    assert set(again) == set(handed_out)


class Resampling(Ledger):
    """Counts only what a checkpoint has: the rest is drawn and sampled again."""

    def __init__(self, folder, *more):
        super().__init__(folder, *more)
        path = folder.parent / CHECKPOINT
        number = json.loads(path.read_text())["iteration"] if path.exists() else 0
        if number < self.num_iterations:
            del self._iterations[number:]
            self._begun = None
            self.finished.clear()


class Newest(Ledger):
    """Goes on behind the newest prompt."""

    def __init__(self, *more):
        super().__init__(*more)
        self.open_groups, self._begun = {}, None
        self.finished.clear()


class Stopped(Exception):  # noqa: N818
    pass


def stopped(folder, ledger_class, rng):
    """The run in this process, every start stopped at some record."""

    def stopping():
        number = [rng.randint(5, 60)]

        class Stops(ledger_class):
            def _add(self, record, **more):
                number[0] -= 1
                if not number[0]:
                    self.close()
                    raise Stopped
                super()._add(record, **more)

        return Stops

    for _ in range(12):
        try:
            learn(folder, stopping())
        except Stopped:
            continue
        break
    else:
        learn(folder, ledger_class)
    return result(folder)[0]


@pytest.mark.parametrize("ledger_class", [Ledger, Newest, Resampling])
def test_wrong_ledgers_are_found(tmp_path, undisturbed, ledger_class):
    found = stopped(tmp_path, ledger_class, random.Random(3))
    expected = undisturbed[0]
    ordinals = [ordinal for _, ordinal in found["trained"]]
    is_same = found["weights"] == expected["weights"]
    is_once = len(set(ordinals)) == len(ordinals)
    has_all = set(ordinals) == {ordinal for _, ordinal in expected["trained"]}
    assert found["iteration"] == NUM_ITERATIONS
    assert (is_same and is_once and has_all) == (ledger_class is Ledger)
