"""``dataset.json`` and the files it answers for."""

import json
import shutil

import pytest

from megatron_k2.data.indexed import read_tokens
from megatron_k2.data.manifest import read_manifest, write_manifest
from megatron_k2.data.prepare import prepare
from megatron_k2.data.prepare_plan import PrepareOptions
from megatron_k2.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    for i in range(60):
        (root / f"{i}.txt").write_text(f"document number {i}\n" * 5)
    prepare(PrepareOptions(output=root / "data", inputs=(root,), train_bpe=290))
    return root / "data"


@pytest.fixture
def dataset(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "moved")


def test_a_manifest_reads_back_as_written_and_the_directory_may_move(dataset):
    manifest = read_manifest(dataset)
    before = (dataset / "dataset.json").read_bytes()
    write_manifest(dataset, manifest)
    assert (dataset / "dataset.json").read_bytes() == before
    assert read_manifest(dataset) == manifest
    assert manifest.tokenizer.path == "tokenizer"


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "valid.bin", "valid.idx"])
@pytest.mark.parametrize(
    ("keep", "message"), [(None, "is missing"), (0, "is empty"), (33, "has 33 bytes")]
)
def test_a_missing_empty_or_truncated_file_is_named(dataset, name, keep, message):
    content = (dataset / name).read_bytes()
    (dataset / name).unlink()
    if keep is not None:
        (dataset / name).write_bytes(content[:keep])
    with pytest.raises(UserError, match=f"{name} {message}"):
        read_manifest(dataset)


def test_a_missing_directory_and_an_unfinished_one_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "none")
    with pytest.raises(UserError, match="interrupted"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2, expected 1"),
        ({"surprise": 1}, "damaged manifest"),
        ({"splits": {"train": {"prefix": "x"}}}, "damaged manifest"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(dataset, change, message):
    fields = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(fields | change))
    with pytest.raises(UserError, match=message):
        read_manifest(dataset)


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json"])
def test_what_is_no_manifest_is_refused(dataset, content):
    (dataset / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="not a dataset manifest"):
        read_manifest(dataset)


def test_reading_tokens_of_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_tokens(tmp_path / "train")
    (tmp_path / "train.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(UserError, match="not a Megatron index"):
        read_tokens(tmp_path / "train")


def test_inspect_and_baseline_print_and_write(dataset, capsys):
    from megatron_k2.cli.main import main

    assert main(["data", "inspect", str(dataset)]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["data", "baseline", str(dataset)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((dataset / "ngram_baseline.json").read_text())
    assert f"{result['bigram_nats']:.4f}" in printed
    assert result["bigram_nats"] < result["unigram_nats"]
    assert main(["data", "inspect", str(dataset / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
