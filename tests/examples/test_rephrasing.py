"""The rephrasing experiment: its world and teacher are what it says, and a run ends in its figure.

Not exercised: what its arms remember, half an hour.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from megatron_k2.fidelity.surface import Surface
from megatron_k2.synthesis.rephrase.coverage import piece_problem
from tests.support.paths import REPOSITORY

FOLDER = REPOSITORY / "examples" / "rephrasing"


def module(name):
    spec = importlib.util.spec_from_file_location(f"rephrasing_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def test_every_rephrasing_passes_the_gates_and_no_form_is_a_question():
    world = module("world")
    for person in world.people(40, 0):
        source = world.article(person)
        assert all(value in source for value in person.facts.values())
        for number in range(10):
            text = world.rephrased(person, number, 0)
            assert not Surface(source, text).gates()
            assert piece_problem(source, text) is None
            assert "?" not in text + source
            assert text.lower().count(person.name.lower()) == len(person.facts)
        assert source.count(person.name) == len(person.facts) // 2, "once a part"
    wrong = world.rephrased(person, 0, 0).replace(person.facts["year"], "1801")
    assert Surface(source, wrong).gates()


def test_a_guess_is_right_once_in_64():
    world = module("world")
    assert {len(values) for values in world.VALUES.values()} == {64}
    assert {len(set(values)) for values in world.VALUES.values()} == {64}
    common = Counter(person.facts["year"] for person in world.people(600, 1)).most_common(1)
    assert common[0][1] < 600 * 0.05
    assert {len(forms) for forms in world.TEACHER.values()} == {5}


def test_passages_of_pythons_documentation():
    found = module("demo").passages(20)
    assert len(set(found)) == 20
    assert all(40 <= len(text.split()) <= 110 for text in found)


@pytest.mark.slow
def test_a_run_ends_in_its_record_and_figure(tmp_path):
    small = "--people 12 --repeats 2 --batch 2 --tune-steps 2 --seeds 0".split()
    path = tmp_path / "rephrasing.json"

    def ran(*more):
        return subprocess.run(
            [sys.executable, FOLDER / "run.py", *small, "--out", tmp_path, *more],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    first = ran("--arms", "raw text, 10 epochs")
    assert first.returncode == 0, first.stderr
    assert not (tmp_path / "rephrasing.png").exists()
    kept = json.loads(path.read_text())["rows"]
    done = ran()
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["rows"][:1] == kept, "what is measured is not run again"
    other = ran("--lr", "1e-3")
    assert (other.returncode, "choose another --out" in other.stderr) == (1, True)
    rows = json.loads((tmp_path / "rephrasing.json").read_text())["rows"]
    assert len({row["arm"] for row in rows}) == 3
    assert len({row["tokens"] for row in rows}) == 1, "arms must see equally many tokens"
    assert (tmp_path / "rephrasing.png").read_bytes().startswith(b"\x89PNG")
