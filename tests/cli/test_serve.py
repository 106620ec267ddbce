"""``megatron-k2 serve``: what it refuses, and a real start over a small export."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from megatron_k2.cli import serve
from megatron_k2.cli.main import main

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None, reason="needs the extra serve"
)


def refused(capsys, *argv):
    assert main(["serve", *argv]) == 2
    return capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(serve, "NEEDED", ("a_package_that_is_nowhere",))
    said = refused(capsys, "--load", "x")
    assert "a_package_that_is_nowhere is not installed; pip install 'megatron-k2[serve]'" in said


@needs_extra
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines: give --api-key-env"),
        (["--api-key-env", "K2_NO_SUCH_VARIABLE"], "this variable is not set"),
        (["--weights-dir", "."], "of use with --admin alone"),
        (["--admin", "--weights-dir", "nowhere"], "nowhere is no directory; make it"),
        (["--load-format", "dummy"], "weights then have to come; give --weights-dir"),
        ([], "no such directory; expected a Hugging Face one, or a run"),
    ],
)
def test_refusals(capsys, flags, said):
    assert said in refused(capsys, "--load", "nowhere", *flags)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A small Hugging Face directory, its tokenizer beside it."""
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from tests.engine.local.models import TINY, reference, saved
    from tests.engine.server.served import tokenizer_in

    folder = saved(reference(TINY), TINY, tmp_path_factory.mktemp("export"))
    tokenizer_in(folder)
    return folder


@pytest.fixture(scope="module")
def run(export, tmp_path_factory):
    """The same model as a run has it."""
    from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf

    directory = tmp_path_factory.mktemp("run") / "run"
    import_hf(export, directory, ImportOptions())
    return directory


@needs_extra
def test_slots_that_do_not_fit_are_refused(capsys, export, run):
    little = ("--memory-gb", "0.0001")
    assert "16 slots x" in refused(capsys, "--load", str(export), *little)
    assert "16 slots x" in refused(capsys, "--load", str(run), "--tokenizer", str(export), *little)
    assert "no tokenizer found" in refused(capsys, "--load", str(run))


@needs_extra
def test_processes_that_cannot_be_are_refused(capsys, export):
    given = ("--load", str(export), "--processes")
    assert "17 processes for 16 slots" in refused(capsys, *given, "17")
    assert "0 processes for 16 slots" in refused(capsys, *given, "0")
    assert "on a CPU alone" in refused(capsys, *given, "2", "--device", "cuda")


@needs_extra
def test_it_starts_answers_and_ends(export):
    command = [sys.executable, "-m", "megatron_k2", "serve", "--load", str(export), "--port", "0"]
    environment = os.environ | {"K2_KEY": "sesame"}
    process = subprocess.Popen(
        [*command, "--api-key-env", "K2_KEY", "--batch-invariant"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        line = process.stdout.readline()
        url = line.rsplit(" ", 1)[-1].strip()
        body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 3, "return_token_ids": True})
        headers = {"authorization": "Bearer sesame"}
        asked = urllib.request.Request(f"{url}/v1/completions", body.encode(), headers)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            found = json.load(answer)
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(30)
    assert line.startswith(f"serving '{export.name}' at http://127.0.0.1:")
    assert len(found["choices"][0]["token_ids"]) <= 3
    assert code in (0, 130)
