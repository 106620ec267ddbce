"""Preparation: the right tokens, in one order whatever happens, and never half a dataset."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import psutil
import pytest
from rich.console import Console

from megatron_k2.data.indexed import read_sequence_lengths, read_tokens
from megatron_k2.data.manifest import read_manifest
from megatron_k2.data.parts import cut_into_parts
from megatron_k2.data.prepare import prepare
from megatron_k2.data.prepare_plan import PrepareOptions
from megatron_k2.data.sources import find_files, is_validation
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.errors import UserError


@pytest.fixture
def console():
    return Console(record=True, file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """An undisturbed run with one worker."""
    output = tmp_path_factory.mktemp("reference") / "data"
    prepare(PrepareOptions(output=output, inputs=(corpus,), train_bpe=300))
    return output


def options_for(corpus, output, **fields):
    defaults = {"inputs": (corpus,), "train_bpe": 300, "num_workers": 1}
    return PrepareOptions(output=output, **defaults | fields)


def contents(directory):
    """All bytes a dataset consists of, tokenizer included."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}


def tokens_slowly(corpus, tokenizer, split, eod=True):
    """The whole split in one plain loop over files and lines."""
    ids = []
    for path in sorted(corpus.rglob("*.*"), key=lambda p: p.relative_to(corpus).as_posix()):
        name, offset = path.relative_to(corpus).as_posix(), 0
        if path.suffix == ".txt":
            documents = [(name, path.read_text(encoding="utf-8"))]
        else:
            documents = []
            for line in path.read_bytes().splitlines(keepends=True):
                documents.append((f"{name}@{offset}", json.loads(line)["text"]))
                offset += len(line)
        for identity, text in documents:
            if text and is_validation(identity, 0.05) == (split == "valid"):
                ids += tokenizer.encode(text) + [tokenizer.eod_id] * eod
    return np.array(ids)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_tokens_equal_a_plain_loop_over_the_documents(corpus, reference, split):
    tokenizer = load_tokenizer(reference / "tokenizer")
    tokens = read_tokens(reference / split)
    assert np.array_equal(tokens, tokens_slowly(corpus, tokenizer, split))
    assert not np.array_equal(tokens, tokens_slowly(corpus, tokenizer, split, eod=False))
    record = read_manifest(reference).splits[split]
    assert record.num_tokens == len(tokens)
    assert record.num_documents == np.count_nonzero(tokens == tokenizer.eod_id)


def test_megatrons_own_reader_sees_the_same_documents(reference):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for split in ("train", "valid"):
        theirs = IndexedDataset(str(reference / split))
        assert len(theirs) == read_manifest(reference).splits[split].num_documents
        assert np.array_equal(np.concatenate(theirs[:]), read_tokens(reference / split))
        assert np.array_equal(theirs.sequence_lengths, read_sequence_lengths(reference / split))
        assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
        assert all(theirs[i][-1] == 1 for i in (0, len(theirs) - 1))


def test_manifest_counts_sources_and_leaves_no_working_files(corpus, reference):
    manifest = read_manifest(reference)
    assert manifest.source.num_files == 32
    assert manifest.source.num_empty_documents >= 2
    assert manifest.tokenizer.vocab_size == 300
    assert set(contents(reference)) == {
        "dataset.json", "train.bin", "train.idx", "valid.bin", "valid.idx",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    }  # fmt: skip


def test_two_workers_give_the_same_bytes_as_one(corpus, reference, tmp_path):
    prepare(options_for(corpus, tmp_path / "data", num_workers=2))
    assert contents(tmp_path / "data") == contents(reference)


def test_parts_tile_the_input_whatever_their_size(corpus):
    files = [(f, 0.05) for f in find_files([corpus], (".txt", ".jsonl"))]
    for part_bytes in (10_000, 54_321, 1 << 20, 1 << 40):
        spans = [span for part in cut_into_parts(files, part_bytes) for span in part.spans]
        for file, _ in files:
            mine = [(s.start, s.end) for s in spans if s.file == file]
            assert mine[0][0] == 0
            assert mine[-1][1] == file.num_bytes
            assert all(a[1] == b[0] for a, b in pairwise(mine))


def _start(corpus, output):
    command = [
        sys.executable, "-m", "megatron_k2", "data", "prepare",
        "--input", corpus, "--output", output, "--train-bpe", "300", "--workers", "2",
    ]  # fmt: skip
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)


def _has_trained(output):
    return (output / "tokenizer").is_dir()


def _has_parts(output):
    return len(list(output.glob(".parts/0*.npz"))) >= 1


def _merges(output):
    return any((output / name).exists() for name in (".train.partial.bin", "train.bin"))


@pytest.mark.parametrize(
    "reached", [_has_trained, _has_parts, pytest.param(_merges, marks=pytest.mark.slow)]
)
def test_a_run_killed_anywhere_and_repeated_gives_the_same_bytes(
    corpus, reference, tmp_path, reached
):
    output = tmp_path / "data"
    process = _start(corpus, output)
    while not reached(output):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="interrupted"):
        read_manifest(output)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, "workers outlived their killed parent"
    prepare(options_for(corpus, output))
    assert contents(output) == contents(reference)


def _interrupted_before_merge(corpus, output, monkeypatch):
    """Leave all parts but no dataset, as a kill before the merge does."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_k2.data.prepare._merge", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(options_for(corpus, output))


def test_finished_parts_are_not_tokenized_again(corpus, tmp_path, monkeypatch, console):
    output = tmp_path / "data"
    _interrupted_before_merge(corpus, output, monkeypatch)
    parts = sorted((output / ".parts").glob("0*.npz"))
    parts[1].unlink()
    before = {p.name: p.stat().st_mtime_ns for p in parts if p.exists()}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_k2.data.prepare._merge", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(options_for(corpus, output), console)
    assert f"resuming: {len(parts) - 1} of {len(parts)} parts" in console.export_text()
    after = {p.name: p.stat().st_mtime_ns for p in parts}
    assert {k: v for k, v in after.items() if k in before} == before
    assert len(after) == len(before) + 1


def test_a_changed_input_starts_over_and_says_so(corpus, tmp_path, monkeypatch, console):
    copy, output = tmp_path / "copy", tmp_path / "data"
    shutil.copytree(corpus, copy)
    _interrupted_before_merge(copy, output, monkeypatch)
    (copy / "sub" / "00.txt").write_text("something else altogether")
    prepare(options_for(copy, output), console)
    assert "inputs changed since the last run; starting over" in console.export_text()
    tokenizer = load_tokenizer(output / "tokenizer")
    assert np.array_equal(read_tokens(output / "train"), tokens_slowly(copy, tokenizer, "train"))


def test_another_tokenizer_starts_over_and_the_same_command_again_does_nothing(
    corpus, reference, tmp_path, console
):
    output = tmp_path / "data"
    shutil.copytree(reference, output)
    (output / "ngram_baseline.json").write_text("{}")
    before = contents(output)
    prepare(options_for(corpus, output), console)
    assert "complete already" in console.export_text()
    assert contents(output) == before
    named = options_for(corpus, output, train_bpe=None, tokenizer=reference / "tokenizer")
    manifest = prepare(named, console)
    assert "holds another or a damaged dataset; starting over" in console.export_text()
    assert manifest.splits == read_manifest(reference).splits
    assert not (output / "ngram_baseline.json").exists()


def test_a_smaller_vocabulary_in_the_same_directory_is_really_used(corpus, tmp_path):
    """The second run must not find the first one's tokenizer in a cache keyed by path."""
    prepare(options_for(corpus, tmp_path / "data", train_bpe=300))
    prepare(options_for(corpus, tmp_path / "data", train_bpe=290))
    assert read_tokens(tmp_path / "data" / "train").max() < 290


def test_a_truncated_dataset_is_made_again(corpus, reference, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(reference, output)
    with (output / "train.bin").open("rb+") as stream:
        stream.truncate(100)
    prepare(options_for(corpus, output))
    assert contents(output) == contents(reference)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bad_line_reaches_the_user_from_a_worker(tmp_path, reference, num_workers):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 200_000 + b'{"text": 1}\n')
    options = PrepareOptions(
        output=tmp_path / "data",
        inputs=(path,),
        tokenizer=reference / "tokenizer",
        num_workers=num_workers,
    )
    with pytest.raises(UserError, match=r"d\.jsonl:200001: 'text' is int"):
        prepare(options)


def test_an_explicit_validation_set_takes_no_document_from_training(tmp_path, reference):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text")
    options = PrepareOptions(
        output=tmp_path / "data",
        inputs=(tmp_path / "train.txt",),
        valid_inputs=(tmp_path / "valid.txt",),
        tokenizer=reference / "tokenizer",
    )
    prepare(options)
    tokenizer = load_tokenizer(reference / "tokenizer")
    for name in ("train", "valid"):
        tokens = read_tokens(tmp_path / "data" / name)
        assert tokenizer.decode(tokens.tolist()) == f"{name} text<|eod|>"
    with pytest.raises(UserError, match="leave it out of one"):
        prepare(replace(options, valid_inputs=options.inputs))


def test_an_empty_validation_split_is_refused_before_any_work(tmp_path, reference):
    (tmp_path / "single.txt").write_text("text")
    options = PrepareOptions(
        output=tmp_path / "data",
        inputs=(tmp_path / "single.txt",),
        tokenizer=reference / "tokenizer",
    )
    with pytest.raises(UserError, match="training: 1, for validation: 0"):
        prepare(options)
    assert not (tmp_path / "data").exists()
    assert set(prepare(replace(options, validation_fraction=0.0)).splits) == {"train"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": ()}, "--input PATH... or --python-stdlib"),
        ({"train_bpe": None}, "--tokenizer PATH or --train-bpe"),
        ({"train_bpe": 10}, "at least 272"),
        ({"validation_fraction": 1.0}, "expected 0 <= fraction < 1"),
        ({"num_workers": 0}, "--workers 0"),
    ],
)
def test_contradictory_options_are_refused(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        options_for(tmp_path, tmp_path / "data", **fields)


def test_two_preparations_of_one_directory_are_refused(corpus, tmp_path):
    from megatron_k2.data.resumable import locked

    output = tmp_path / "data"
    with locked(output), pytest.raises(UserError, match="another process"):
        prepare(options_for(corpus, output))


def test_starting_over_drops_the_old_sample_indices_and_nothing_else_of_the_users(tmp_path):
    text = tmp_path / "data" / "train" / "a.txt"  # an input below the output, of a split's name
    text.parent.mkdir(parents=True)
    text.write_text("some words " * 20)
    index = text.parent / "cache" / "ContentDataset_indices" / "x.npy"
    index.parent.mkdir(parents=True)
    index.write_bytes(b"")
    options = PrepareOptions(
        tmp_path / "data", inputs=(text.parent,), train_bpe=300, validation_fraction=0
    )
    assert prepare(options).splits["train"].num_documents == 1
    assert text.exists()
    assert not index.exists()
