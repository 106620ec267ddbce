"""A corpus that changes where it lies: every document of the new one is drawn, and no other."""

import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_k2.data.content import WHOLE_BYTES, WINDOW_BYTES, WINDOWS, content_hash
from megatron_k2.data.indexed import bin_path, write_indexed
from megatron_k2.flags.megatron import add_k2_arguments, expand
from megatron_k2.training import providers
from tests.support.single_rank import one_rank

EOD, LENGTH, SEQUENCE = 1, 16, 16
SIZES = "--preset k2-tiny --vocab-size 128 --tokenizer-type NullTokenizer"


def _write(prefix, ids):
    """One document of each id, repeated, closed by EOD."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    documents = [np.array([*(LENGTH - 1) * [i], EOD], dtype=np.uint16) for i in ids]
    write_indexed(prefix, documents, np.dtype(np.uint16))


@contextmanager
def _arguments(flags):
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args, validate_args

    size = f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --seed 7"
    before, sys.argv = sys.argv, ["train", *expand([*SIZES.split(), *size.split(), *flags],
                                                   cuda=False)]  # fmt: skip
    try:
        args = parse_args(add_k2_arguments)
        validate_args(args)
        global_vars.set_args(args)
        yield
    finally:
        sys.argv = before
        global_vars._GLOBAL_ARGS = None


def _drawn(flags, num_documents):
    """The documents' ids that two epochs of samples hold."""
    num_samples = 2 * num_documents * LENGTH // SEQUENCE
    with one_rank(), _arguments(flags):
        train, _, _ = providers.datasets_provider([num_samples, 0, 0])
        return {int(t) for i in range(num_samples) for t in train[i]["tokens"]} - {EOD}


ALL = ["--split", "100,0,0"]
FORMS = {
    "train-data-path": lambda d: ["--train-data-path", f"{d}/c"],
    "data-path": lambda d: ["--data-path", f"{d}/c", *ALL],
    "blend": lambda d: ["--train-data-path", "1", f"{d}/c", "1", f"{d}/other"],
    "data-args-path": lambda d: ["--data-args-path", f"{d}/list.txt", *ALL],
    "per-split": lambda d: ["--per-split-data-args-path", f"{d}/blend.json"],
    "cache": lambda d: ["--train-data-path", f"{d}/c", "--data-cache-path", f"{d}/cache"],
    "blend-cache": lambda d: [*FORMS["blend"](d), "--data-cache-path", f"{d}/cache"],
}
CORPORA = {"first": range(10, 30), "grown": range(10, 50), "shrunk": range(10, 15)}
CORPORA |= {"replaced": range(80, 100), "again": range(10, 30)}


@pytest.mark.parametrize("form", FORMS)
def test_of_a_corpus_that_changes_every_document_is_drawn_and_no_other(tmp_path, form):
    flags = FORMS[form](tmp_path)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/c\n")
    (tmp_path / "blend.json").write_text(
        json.dumps({"train": f"{tmp_path}/c", "valid": None, "test": None})
    )
    _write(tmp_path / "other", [120])
    beside = {120} if "blend" in form else set()
    for ids in CORPORA.values():
        _write(tmp_path / "c", ids)
        assert _drawn(flags, 2 * len(ids)) == set(ids) | beside


def test_megatrons_own_class_draws_the_old_corpus_documents_alone(tmp_path, monkeypatch):
    """The wrong variant: what the test above would find without the content in the name."""
    monkeypatch.setattr(providers, "ContentDataset", GPTDataset)
    flags = FORMS["train-data-path"](tmp_path)
    _write(tmp_path / "c", CORPORA["first"])
    assert _drawn(flags, 20) == set(CORPORA["first"])
    _write(tmp_path / "c", CORPORA["grown"])
    assert _drawn(flags, 20) == set(CORPORA["first"])


def test_the_index_of_an_unchanged_corpus_is_used_again(tmp_path):
    flags = FORMS["cache"](tmp_path)
    _write(tmp_path / "c", range(10, 20))
    for _ in range(2):
        assert _drawn(flags, 10) == set(range(10, 20))
        assert len(list((tmp_path / "cache").glob("*document_index.npy"))) == 1


def test_the_hash_is_of_the_content_wherever_it_lies(tmp_path):
    _write(tmp_path / "a", range(10, 20))
    _write(tmp_path / "b" / "a", range(10, 20))
    _write(tmp_path / "c", [*range(10, 19), 20])  # as many documents and tokens
    first, same, other = (content_hash(str(tmp_path / name)) for name in ("a", "b/a", "c"))
    assert first == same != other
    assert content_hash(str(tmp_path / "absent")) is None
    assert content_hash("msc://bucket/a") is None


def test_of_a_large_file_the_ends_and_windows_between_are_read(tmp_path):
    _write(tmp_path / "a", [10])
    size = 2 * WHOLE_BYTES
    seen = []
    inside = 32 * (size - WINDOW_BYTES) // (WINDOWS - 1) + 1
    for place in (None, 0, size - 1, WINDOW_BYTES // 2, inside, WINDOW_BYTES + 1):
        with bin_path(tmp_path / "a").open("wb") as tokens:
            tokens.truncate(size)
            if place is not None:
                tokens.seek(place)
                tokens.write(b"x")
        seen.append(content_hash(str(tmp_path / "a")))
    # Between the first two windows nothing is seen: said in the docstring, and in docs/data.md.
    assert seen[-1] == seen[0]
    assert len(set(seen)) == len(seen) - 1
