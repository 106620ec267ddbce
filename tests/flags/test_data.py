"""What the flags of data name is looked at before a model is built, whichever flag names it."""

import json
import os

import numpy as np
import pytest

from megatron_k2.cli.main import main
from megatron_k2.data.content import content_hash
from megatron_k2.data.indexed import bin_path, idx_path, write_indexed
from megatron_k2.errors import UserError
from megatron_k2.flags.data import ALLOW_OTHER_DATA, SHOWN, training_contents
from megatron_k2.flags.megatron import expand
from megatron_k2.run.flags import read_flags
from megatron_k2.run.iterations import TRACKER
from megatron_k2.training.preflight import check_run, drop_damaged_index_cache, write_run_record

TINY = ["--preset", "k2-tiny", "--vocab-size", "128", "--tokenizer-type", "NullTokenizer"]
NAMED_BY = {
    "--train-data-path": lambda p: ["--train-data-path", p],
    "--valid-data-path": lambda p: ["--valid-data-path", "1", p],
    "--data-path": lambda p: ["--data-path", "0.5", p, "0.5", p],
    "--data-args-path": lambda p: ["--data-args-path", _file(p, "list.txt", f"1 {p}\n")],
    "--per-split-data-args-path": lambda p: [
        "--per-split-data-args-path",
        _file(p, "blend.json", json.dumps({"train": [1, p], "valid": None, "test": None})),
    ],
}


def _file(prefix, name, text):
    path = os.path.join(os.path.dirname(prefix), name)
    with open(path, "w") as stream:
        stream.write(text)
    return path


def _flags(*words):
    return read_flags(expand([*TINY, *words], cuda=False))


def _check(*words):
    check_run(_flags(*words), 1)


def _write(prefix, ids=(5, 6, 7)):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    documents = [np.full(40, i, dtype=np.uint16) for i in ids]
    write_indexed(prefix, documents, np.dtype(np.uint16))
    return str(prefix)


@pytest.mark.parametrize("flag", NAMED_BY)
def test_what_is_absent_or_cut_is_named_whichever_flag_names_it(tmp_path, flag):
    words = NAMED_BY[flag]
    with pytest.raises(UserError, match=r"absent\.idx does not exist"):
        _check(*words(str(tmp_path / "absent")))
    prefix = tmp_path / "c"
    _check(*words(_write(prefix)))
    for path, said in (
        (bin_path(prefix), r"c\.bin has 236 bytes, expected 240"),
        (idx_path(prefix), r"c\.idx has 98 bytes, expected 102"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[:-4])
        with pytest.raises(UserError, match=said):
            _check(*words(str(prefix)))
        path.write_bytes(whole[:20])
        with pytest.raises(UserError, match=r"c\.(bin has 20 bytes|idx is not a Megatron index)"):
            _check(*words(str(prefix)))
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name} does not exist"):
            _check(*words(str(prefix)))
        path.write_bytes(whole)


def test_a_dataset_of_no_document_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no document"):
        _check("--data-path", _write(tmp_path / "c", ids=()))


def test_data_named_twice_or_divided_twice_is_refused(tmp_path):
    prefix = _write(tmp_path / "c")
    with pytest.raises(UserError, match="--data-path and --train-data-path"):
        _check("--data-path", prefix, "--train-data-path", prefix)
    with pytest.raises(UserError, match="--split 9,1,0 divides --data-path"):
        _check("--train-data-path", prefix, "--split", "9,1,0")
    _check("--data-path", prefix, "--split", "9,1,0")


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), ("", "is empty"), (b"\xff\xfe", "not readable")]
)
def test_a_list_of_data_that_cannot_be_read_is_named(tmp_path, content, said):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"--data-args-path .*list\.txt.*{said}"):
        _check("--data-args-path", str(path))


def test_a_cache_that_is_no_directory_is_refused(tmp_path):
    prefix = _write(tmp_path / "c")
    _check("--data-path", prefix, "--data-cache-path", str(tmp_path / "new" / "cache"))
    with pytest.raises(UserError, match=r"c\.idx is not a directory"):
        _check("--data-path", prefix, "--data-cache-path", f"{prefix}.idx")


def test_indices_that_a_kill_cut_short_are_dropped_from_a_cache_too(tmp_path):
    np.save(tmp_path / "whole.npy", np.arange(9))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:140])
    drop_damaged_index_cache([], str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["whole.npy"]


@pytest.fixture
def resumable(tmp_path):
    """A run that was trained on ``c`` and has a checkpoint: its directory and flags."""
    prefix = _write(tmp_path / "c")
    words = ["--train-data-path", prefix, "--save", str(tmp_path / "run")]
    write_run_record(_flags(*words), 1)
    (tmp_path / "run" / TRACKER).write_text("3")
    return tmp_path, words


def test_a_resume_on_other_content_is_refused_with_both_hashes_unless_forced(resumable, capsys):
    directory, words = resumable
    _check(*words)
    before = content_hash(str(directory / "c"))
    _write(directory / "c", ids=(5, 6, 8))
    now = content_hash(str(directory / "c"))
    assert before != now
    assert main(["pretrain", *TINY, *words]) == 2
    said = capsys.readouterr().err
    assert before[:SHOWN] in said
    assert now[:SHOWN] in said
    assert ALLOW_OTHER_DATA in said
    _check(*words, ALLOW_OTHER_DATA)
    write_run_record(_flags(*words, ALLOW_OTHER_DATA), 1)  # from here on, this is its data
    _check(*words)


def test_data_that_was_moved_is_the_same_and_an_added_dataset_is_not(resumable):
    directory, words = resumable
    for path in (bin_path(directory / "c"), idx_path(directory / "c")):
        path.rename(directory / path.name.replace("c", "d"))
    words[1] = str(directory / "d")
    _check(*words)
    other = _write(directory / "e", ids=(9,))
    with pytest.raises(UserError, match=r"no dataset with content sha256 -, and here is .*/e with"):
        _check("--train-data-path", words[1], other, *words[2:])


def test_without_a_checkpoint_or_in_another_phase_any_data_is_right(resumable):
    directory, words = resumable
    _write(directory / "c", ids=(8,))
    load = ["--load", str(directory / "run"), "--save", str(directory / "next")]
    _check(*words[:2], *load, "--finetune")
    (directory / "run" / TRACKER).unlink()
    _check(*words)


def test_the_record_holds_the_whole_hash_of_what_is_trained_on(resumable):
    directory, words = resumable
    found = training_contents(_flags(*words, "--valid-data-path", str(directory / "c")))
    assert found == {str(directory / "c"): content_hash(str(directory / "c"))}
    record = json.loads((directory / "run" / "run.json").read_text())
    assert record["data"] == found
