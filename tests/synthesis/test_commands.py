"""``megatron-k2 rephrase``, verb by verb, on a folder and a scripted teacher."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_k2.cli.main import main
from megatron_k2.data.manifest import read_manifest
from megatron_k2.flags.data import read_blend
from tests.fidelity.pairs import pairs
from tests.fidelity.passages import PASSAGES
from tests.support.paths import REPOSITORY
from tests.synthesis.running import teacher

TEXTS = [" ".join(said for said, _ in passage.said) for passage in PASSAGES]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def folder(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(TEXTS):
        (texts / f"{number:02d}.txt").write_text(text)
    return tmp_path


def command(folder, url, *more, output="run"):
    words = ["rephrase", "run", "--input", str(folder / "texts"), "--endpoint", url]
    return [*words, "--output", str(folder / output), "--piece-tokens", "24", *more]


def records(folder, name="kept.jsonl", output="run"):
    return [json.loads(line) for line in (folder / output / name).read_text().splitlines()]


def test_plan_asks_nothing_and_counts(folder, capsys):
    words = ["rephrase", "plan", "--input", str(folder / "texts"), "--rephrasings", "3"]
    nowhere = ["--endpoint", "http://127.0.0.1:9", "--output", str(folder / "run")]
    assert main([*words, *nowhere, "--prompt-price", "10", "--no-check"]) == 0
    assert not (folder / "run").exists()
    out, error = capsys.readouterr()
    assert f"{len(TEXTS)} documents" in out
    assert "3 rephrasings" in out
    assert "at most 2 times" in error


def test_run_killed_and_rerun_then_reported_and_mixed(folder, capsys):
    with teacher() as (url, _):
        assert main(command(folder, url, "--shards", "1", output="undisturbed")) == 0
    whole = (folder / "undisturbed" / "kept.jsonl").read_bytes()
    with teacher(errors=0.05, busy=0.05, delay=0.02) as (url, counts):
        words = command(folder, url, "--concurrency", "8", "--shards", "2")
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_k2", *words], env=ENVIRONMENT, start_new_session=True
        )
        while counts().get("answered", 0) < 100:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (folder / "run" / "kept.jsonl").exists()
        for _ in range(50):  # workers end with the one that started them, soon
            if (code := main(words)) == 0:
                break
            time.sleep(0.2)
        assert code == 0
        assert counts()["repeated"] <= 2 * (8 + 64)
    assert (folder / "run" / "kept.jsonl").read_bytes() == whole
    capsys.readouterr()
    page = folder / "page.html"
    assert main(["rephrase", "report", str(folder / "run"), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "kept: faithful" in out
    assert "self-BLEU" in out
    assert "<script id" in page.read_text()
    assert PASSAGES[0].said[0][0] in page.read_text()


def test_what_is_unverified_is_refused_unless_told_otherwise(folder, capsys):
    with teacher() as (url, _):
        assert main(command(folder, url, "--no-check")) == 0
    mixing = ["rephrase", "mix", str(folder / "run"), "--output", str(folder / "mix")]
    assert main(mixing) == 1
    assert f"unverified {len(TEXTS)}" in capsys.readouterr().out
    assert main([*mixing, "--accept-unverified", "--without-source"]) == 0


def test_a_mixture_has_lineage_tokens_and_a_blend(folder, capsys):
    evaluation = folder / "suite.jsonl"
    question = {"question": TEXTS[3].split(". ")[0] + "?", "answer": ["Yes"]}
    evaluation.write_text(json.dumps(question) + "\n")
    (folder / "texts" / "copy.txt").write_text(TEXTS[0])
    with teacher() as (url, _):
        assert main(command(folder, url, "--rephrasings", "3", "--teacher-licence", "MIT")) == 0
    assert "3 sources were another's double" in capsys.readouterr().out
    prepare = ["data", "prepare", "--input", str(folder / "texts"), "--train-bpe", "300"]
    assert main([*prepare, "--output", str(folder / "raw"), "--workers", "1"]) == 0
    mixing = [
        "rephrase", "mix", str(folder / "run"), "--output", str(folder / "mix"), "--decontaminate",
        str(evaluation), "--ngram", "8", "--tokenizer", str(folder / "raw" / "tokenizer"),
        "--duplicate", "0.95",
    ]  # fmt: skip
    assert main(mixing) == 0
    mixture = json.loads((folder / "mix" / "mixture.json").read_text())["domains"]["run"]
    assert mixture["refused"]["contaminated"] == 3
    assert mixture["refused"].get("rephrasings", 0) + mixture["refused"].get("duplicate", 0) > 0
    assert mixture["licences"] == {"source not stated, teacher MIT": mixture["documents"]}
    manifest = read_manifest(folder / "mix" / "run" / "dataset")
    assert manifest.splits["train"].num_tokens == mixture["tokens"]
    assert manifest.splits["train"].num_documents == mixture["documents"]
    weight, prefix = read_blend(folder / "mix" / "blend.json")["train"]
    assert float(weight) == mixture["tokens"]
    assert prefix == str((folder / "mix" / "run" / "dataset" / "train").resolve())
    kept = records(folder, "run/documents.jsonl", output="mix")
    by_source = [record["source_sha256"] for record in kept]
    assert max(map(by_source.count, by_source)) <= 2
    assert all(record["prompt_sha256"] and record["scores"] for record in kept)


def test_ctrl_c_stops_gracefully_and_the_same_command_goes_on(folder):
    with teacher(delay=0.02) as (url, counts):
        words = command(folder, url, "--concurrency", "4")
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_k2", *words], env=ENVIRONMENT, start_new_session=True
        )
        while counts().get("answered", 0) < 20:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert main(words) == 0
        assert counts()["repeated"] == 0
    assert len(records(folder)) == len(TEXTS)


def test_errors_are_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    (folder / "bad.jsonl").write_text('{"text": "whole"}\n{"text": "tor')
    with teacher() as (url, _):
        good = command(folder, url)
        bad = command(folder, url, output="bad")
        bad[3] = str(folder / "bad.jsonl")
        cases = [
            ([*good, "--api-key-env", "NO_SUCH_KEY"], "key_env NO_SUCH_KEY"),
            ([*good, "--engine", "cloud"], "--engine cloud"),
            ([*good, "--kind", "poetry"], "--kind poetry"),
            ([*good, "--votes", "4"], "num_votes 4"),
            ([*good, "--style-set", "none"], "no such set or file"),
            (bad, "bad.jsonl:2: not JSON"),
            (command(folder, "http://127.0.0.1:9"), "give --model"),
            (["rephrase", "report", str(folder / "run")], "has no kept.jsonl"),
            (["rephrase", "mix", str(folder), "--output", str(folder / "m")], "job.json"),
            (["rephrase", "score", "--pairs", str(folder / "bad.jsonl")], "bad.jsonl:1: expected"),
        ]
        for words, said in cases:
            assert main(words) == 2, words
            error = [line for line in capsys.readouterr().err.splitlines() if "note:" not in line]
            assert len(error) == 1, error
            assert said in error[0]
    with teacher(refuses=404) as (url, _):
        assert main(command(folder, url, "--model", "unknown", output="new")) == 2
        assert "status 404: not here" in capsys.readouterr().err


def test_score_and_calibrate(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"source": p.source, "rewrite": p.rewrite, "kind": p.kind} for p in pairs()[::3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["rephrase", "score", "--pairs", str(path)]) == 0
    out = capsys.readouterr().out
    assert "advisory: not a verdict" in out
    assert "swapped_numbers" in out
    saved = tmp_path / "threshold.json"
    with teacher(accuracy=0.98) as (url, _):
        asked = ["--pairs", str(path), "--endpoint", url]
        assert main(["rephrase", "score", *asked]) == 0
        assert "AUC" in capsys.readouterr().out
        assert main(["rephrase", "calibrate", *asked, "--output", str(saved)]) == 0
    assert json.loads(saved.read_text())["score"] == "model"
    advice = tmp_path / "advice.json"
    assert main(["rephrase", "calibrate", "--pairs", str(path), "--output", str(advice)]) == 0
    words = ["rephrase", "run", "--input", str(path), "--endpoint", "http://127.0.0.1:9"]
    words += ["--model", "m", "--output", str(tmp_path / "run"), "--json-key", "source"]
    assert main([*words, "--calibration", str(advice)]) == 2
    assert "decide nothing" in capsys.readouterr().err
