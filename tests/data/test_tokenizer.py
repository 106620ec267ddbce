"""Hugging Face tokenizers, the trained BPE, and finding a tokenizer on disk."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.data.special_tokens import CONFIG_FILE, special_token
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.errors import UserError

TEXTS = ["def add(a, b):\n    return a + b\n", "the quick brown fox " * 5, "Größe 你好"]


@pytest.fixture(scope="module")
def bpe_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    train_byte_bpe(TEXTS, 300, directory)
    return directory


def test_trained_bpe_puts_its_control_tokens_first(bpe_directory):
    tokenizer = load_tokenizer(bpe_directory)
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.vocab_size) == (0, 1, 300)


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_trained_bpe_round_trips_any_text_without_control_ids(bpe_directory, text):
    tokenizer = load_tokenizer(bpe_directory)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1} & set(ids)


def test_names_of_control_tokens_in_text_stay_text(bpe_directory):
    tokenizer = load_tokenizer(bpe_directory)
    ids = tokenizer.encode("a<|eod|>b")
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a<|eod|>b"
    assert tokenizer.decode([1]) == "<|eod|>"


def test_training_twice_gives_the_same_files(tmp_path, bpe_directory):
    train_byte_bpe(TEXTS, 300, tmp_path)
    assert load_tokenizer(tmp_path).identity == load_tokenizer(bpe_directory).identity
    train_byte_bpe(TEXTS[:2], 300, tmp_path)
    assert load_tokenizer(tmp_path).identity != load_tokenizer(bpe_directory).identity


def test_transformers_reads_what_save_writes(tmp_path, bpe_directory):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(bpe_directory)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert load_tokenizer(tmp_path).identity == tokenizer.identity


def test_a_lone_tokenizer_json_gets_what_transformers_needs(tmp_path, bpe_directory):
    from transformers import AutoTokenizer

    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "tokenizer.json").write_bytes((bpe_directory / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(lone / "tokenizer.json")
    assert (tokenizer.eod_id, tokenizer.bos_id) == (1, None)
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.encode(TEXTS[0], add_special_tokens=False) == tokenizer.encode(TEXTS[0])
    assert theirs.eos_token_id == 1


def test_a_directory_without_tokenizer_json_goes_through_transformers(tmp_path, bpe_directory):
    model = json.loads((bpe_directory / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|eod|>", "bos_token": "<|bos|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<|eod|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "transformers"
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (1, 300)
    assert tokenizer.encode(TEXTS[0]) == load_tokenizer(bpe_directory).encode(TEXTS[0])
    assert 1 not in tokenizer.encode("a<|eod|>b")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").identity == tokenizer.identity


def test_tokenizer_json_without_an_end_of_document_token_is_refused(tmp_path, bpe_directory):
    fields = (bpe_directory / "tokenizer.json").read_text().replace("<|eod|>", "<|nothing|>")
    (tmp_path / "tokenizer.json").write_text(fields)
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("notes.txt", "x"), ("tokenizer.json", '{"version": "1.0"}')],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="not a"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a"):
        load_tokenizer(tmp_path / name)


def test_a_missing_path_and_a_tiny_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="at least 272"):
        train_byte_bpe(TEXTS, 271, tmp_path)


EOD = "<|eod|>"
ADDED = {"__type": "AddedToken", "content": EOD, "lstrip": False, "normalized": False}
ADDED |= {"rstrip": False, "single_word": False, "special": True}


def _with_files(directory, bpe_directory, config, mapped):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes((bpe_directory / "tokenizer.json").read_bytes())
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(kind | config))
    if mapped is not None:
        (directory / "special_tokens_map.json").write_text(json.dumps(mapped))
    return directory


DECODER = {"added_tokens_decoder": {"0": ADDED | {"content": "<|bos|>"}, "1": ADDED}}
PLAIN = {key: value for key, value in ADDED.items() if key != "__type"}


@pytest.mark.parametrize(
    ("config", "mapped"),
    [
        ({"eos_token": EOD}, None),
        ({"eos_token": ADDED}, None),
        ({}, {"eos_token": EOD}),
        ({}, {"eos_token": PLAIN}),
        ({"eos_token": None}, {"eos_token": EOD}),
        ({"eos_token": "<|bos|>"}, {"eos_token": PLAIN}),  # the map wins without a decoder,
        (DECODER | {"eos_token": EOD}, {"eos_token": "<|bos|>"}),  # and is not read with one
    ],
)
def test_the_end_token_is_the_one_that_transformers_finds(tmp_path, bpe_directory, config, mapped):
    from transformers import AutoTokenizer

    directory = _with_files(tmp_path / "t", bpe_directory, config, mapped)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eod_id == 1 == AutoTokenizer.from_pretrained(directory).eos_token_id
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eod_id == 1


@pytest.mark.parametrize(
    ("config", "mapped"),
    [
        ({"eos_token": [EOD]}, None),
        ({}, {"eos_token": [PLAIN]}),
        (DECODER | {"eos_token": None}, {"eos_token": EOD}),
        (DECODER, {"eos_token": PLAIN}),
        (None, {"eos_token": EOD}),
        ({"eos_token": None}, {"eos_token": None}),
        ({"eos_token": ""}, None),
    ],
)
def test_a_list_of_one_a_null_and_the_other_file_are_understood(
    tmp_path, bpe_directory, config, mapped
):
    assert load_tokenizer(_with_files(tmp_path, bpe_directory, config, mapped)).eod_id == 1


@pytest.mark.parametrize(
    ("config", "mapped", "said"),
    [
        ({"eos_token": [EOD, "<|bos|>"]}, None, r"tokenizer_config\.json: eos_token is \["),
        ({"eos_token": 1}, None, "eos_token is 1; one token is expected"),
        ({"eos_token": {"text": EOD}}, None, "an object with 'content'"),
        ({}, {"eos_token": [[EOD]]}, r"special_tokens_map\.json: eos_token is"),
        ({"eos_token": "<|other|>"}, None, r"none of <\|other\|> is in the vocabulary"),
    ],
)
def test_an_end_token_that_is_none_is_refused_by_name(
    tmp_path, bpe_directory, config, mapped, said
):
    with pytest.raises(UserError, match=said):
        load_tokenizer(_with_files(tmp_path, bpe_directory, config, mapped))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_file_of_special_tokens_is_named(tmp_path, bpe_directory, name, content):
    directory = _with_files(tmp_path, bpe_directory, {}, {})
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: not a JSON object"):
        load_tokenizer(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tiktoken.model"])
def test_a_file_that_git_lfs_left_out_is_named(tmp_path, bpe_directory, name):
    directory = _with_files(tmp_path, bpe_directory, {}, None)
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid x\nsize 1\n")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        load_tokenizer(directory)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_config_in_another_encoding_than_utf_8_is_refused(tmp_path, encoding):
    """transformers, which reads the tokenizer of an export, would not take it."""
    (tmp_path / CONFIG_FILE).write_text('{"eos_token": "[EOS]"}', encoding=encoding)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        special_token(tmp_path, "eos_token")
    (tmp_path / CONFIG_FILE).write_text('{"eos_token": "[EOS]"}', encoding="utf-8")
    assert special_token(tmp_path, "eos_token") == "[EOS]"
