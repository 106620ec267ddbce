"""K2's tokenizer against a slow byte-pair twin, at toy size and on the real vocabulary file.

Not exercised: equality with the released Python code itself, which is not shipped here; its split
loop is spelled out below and the pattern's alternatives are read by another regex engine.
"""

import base64
import json
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from megatron_k2.data import tiktoken_tokenizer as module
from megatron_k2.data.tiktoken_tokenizer import (
    PRE_TOKEN_PATTERN,
    TiktokenTokenizer,
    split_long_text,
)
from megatron_k2.errors import UserError
from tests.support.paths import SHARED

K2 = SHARED / "data" / "kimi-k2"
SAMPLES = [
    "Hello world, it's 12345 o'clock!\r\n\r\n  def f(x):\n\treturn x  ",
    "你好world的HTTPServer2Go",
    "Kimi的模型。Größe, naïve, ΑΒΓ αβγ, हिन्दी, 日本語のテキスト",
    "🙂👩‍👩‍👧 \u0301combining A\u0301 I'LL we'd",
    "<|im_end|> [BOS]",
    "",
]


@pytest.fixture(scope="module")
def k2() -> TiktokenTokenizer:
    if not (K2 / "tiktoken.model").is_file():
        pytest.skip(f"Kimi K2's tokenizer files are not at {K2}")
    return TiktokenTokenizer(K2)


def toy_directory(directory: Path, merges: tuple[bytes, ...] = (b"he", b"ll", b"hell", b"hello")):
    """256 bytes and a few merges, then 256 control tokens of which three are named."""
    directory.mkdir(exist_ok=True)
    tokens = [bytes([i]) for i in range(256)] + list(merges)
    lines = [base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens)]
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines))
    names = {len(tokens): "[BOS]", len(tokens) + 1: "[EOS]", len(tokens) + 2: "<|im_end|>"}
    config = {
        "added_tokens_decoder": {str(i): {"content": name} for i, name in names.items()},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_bytes_of_every_id(tmp_path):
    held = TiktokenTokenizer(toy_directory(tmp_path)).token_bytes()
    assert held[:258] == [*(bytes([i]) for i in range(256)), b"he", b"ll"]
    assert held[260:263] == [b"[BOS]", b"[EOS]", b"<|im_end|>"]
    assert len(held) == 260 + 256


def encode_slowly(text: str, ranks: dict[bytes, int], pattern: str = PRE_TOKEN_PATTERN):
    """Byte-pair encoding by its definition: merge the lowest-ranked neighbours until none is."""
    ids = []
    for piece in regex.findall(pattern, text, flags=regex.V1):
        parts = [bytes([b]) for b in piece.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, 1 << 60) for a, b in pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[at] == 1 << 60:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_k2_has_exactly_the_models_rows_and_the_published_control_ids(k2):
    assert k2.vocab_size == 163_840
    assert (k2.bos_id, k2.eod_id) == (163_584, 163_585)
    assert k2.special_ids["<|im_end|>"] == 163_586
    assert k2.special_ids["<|im_middle|>"] == 163_601
    assert k2.special_ids["[PAD]"] == 163_839
    assert k2.special_ids["<|reserved_token_163589|>"] == 163_589
    assert len(k2.special_ids) == 256


@pytest.mark.parametrize("text", SAMPLES)
def test_k2_encodes_as_the_slow_twin_does_and_round_trips(k2, text):
    ranks = module.read_ranks(K2 / "tiktoken.model")
    ids = k2.encode(text)
    assert ids == encode_slowly(text, ranks)
    assert k2.decode(ids) == text


def test_the_slow_twin_without_the_trailing_space_rule_disagrees(k2):
    ranks = module.read_ranks(K2 / "tiktoken.model")
    wrong = PRE_TOKEN_PATTERN.replace(r"|\s+(?!\S)", "")
    assert wrong != PRE_TOKEN_PATTERN
    assert k2.encode("x  def") != encode_slowly("x  def", ranks, wrong)


def test_no_merge_crosses_from_latin_into_han(tmp_path):
    """The rule by which K2's pattern differs from o200k's; the twin without it does merge."""
    tokenizer = TiktokenTokenizer(toy_directory(tmp_path, (b"a\xe4",)))
    ranks = module.read_ranks(tmp_path / "tiktoken.model")
    no_han = PRE_TOKEN_PATTERN.replace(r"[\p{Han}]+|", "").replace(r"&&[^\p{Han}]", "")
    assert tokenizer.encode("a你") == list("a你".encode())
    assert encode_slowly("a你", ranks, no_han)[0] == 256


def test_a_literal_control_token_stays_text(tmp_path):
    tokenizer = TiktokenTokenizer(toy_directory(tmp_path))
    ids = tokenizer.encode("a<|im_end|>b[EOS]")
    assert max(ids) < 260
    assert tokenizer.decode(ids) == "a<|im_end|>b[EOS]"
    control = tokenizer.special_ids["<|im_end|>"]
    assert tokenizer.decode([control]) == "<|im_end|>"
    assert control not in ids


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    tokenizer = TiktokenTokenizer(toy_directory(tmp_path))
    assert tokenizer.vocab_size == 516
    tokenizer.decode([515])
    with pytest.raises(KeyError):
        tokenizer.decode([516])


def test_toy_vocabulary_encodes_as_the_slow_twin_does(tmp_path):
    tokenizer = TiktokenTokenizer(toy_directory(tmp_path))
    ranks = module.read_ranks(tmp_path / "tiktoken.model")
    for text in [*SAMPLES, "hello hell he"]:
        assert tokenizer.encode(text) == encode_slowly(text, ranks)
    assert tokenizer.encode("hello")[0] == 259


def split_as_released(text: str, max_chars: int, max_run: int, restart: int = 1) -> list[str]:
    """The released loop, character by character; ``restart`` is the count after a cut."""
    pieces = []
    for begin in range(0, len(text), max_chars):
        piece = text[begin : begin + max_chars]
        length, is_space, start = 0, piece[0].isspace(), 0
        for i, char in enumerate(piece):
            if is_space ^ char.isspace():
                length, is_space = 1, char.isspace()
            else:
                length += 1
                if length > max_run:
                    pieces.append(piece[start:i])
                    start, length = i, restart
        pieces.append(piece[start:])
    return pieces


LONG_TEXTS = [
    "a" * 25_000,
    "a" * 25_001,
    "a" * 75_001 + " b",
    "x" + " \n" * 30_000 + "y" * 60_000,
    "word " * 100_000,
    "z" * 410_000,
    "\u2003\x1c" * 13_000 + "q",
]


@pytest.mark.parametrize("text", LONG_TEXTS, ids=range(len(LONG_TEXTS)))
def test_long_text_is_cut_where_the_released_loop_cuts(text):
    pieces = list(split_long_text(text))
    assert pieces == split_as_released(text, 400_000, 25_000)
    assert "".join(pieces) == text


def test_a_loop_that_forgets_the_character_at_the_cut_disagrees():
    text = "a" * 75_001
    assert list(split_long_text(text)) != split_as_released(text, 400_000, 25_000, restart=0)


def test_a_changed_vocabulary_file_is_read_anew(tmp_path):
    first = TiktokenTokenizer(toy_directory(tmp_path))
    second = TiktokenTokenizer(toy_directory(tmp_path, (b"lo", b"el", b"hel", b"helo")))
    assert first.identity != second.identity
    assert first.encode("hello") != second.encode("hello")


def test_save_copies_both_files_with_the_same_identity(tmp_path):
    tokenizer = TiktokenTokenizer(toy_directory(tmp_path / "a"))
    tokenizer.save(tmp_path / "b")
    assert TiktokenTokenizer(tmp_path / "b").identity == tokenizer.identity


def test_damaged_files_are_refused_by_name(tmp_path):
    directory = toy_directory(tmp_path)
    (directory / "tokenizer_config.json").write_text('{"bos_token": "x"}')
    with pytest.raises(UserError, match="no added_tokens_decoder, eos_token"):
        TiktokenTokenizer(directory)
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json is missing"):
        TiktokenTokenizer(directory)
    toy_directory(tmp_path)
    with (directory / "tiktoken.model").open("ab") as stream:
        stream.write(b"\nnot base64 at all")
    with pytest.raises(UserError, match=r"tiktoken\.model:261"):
        TiktokenTokenizer(directory)


def test_control_ids_of_another_vocabulary_are_refused(tmp_path):
    directory = toy_directory(tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["163586"] = {"content": "<|x|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"163586 lies outside 260\.\.515"):
        TiktokenTokenizer(directory)


def _configured(directory, **changes):
    path = toy_directory(directory) / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return directory, config


def test_special_tokens_in_every_spelling_are_the_same_ids(tmp_path):
    plain = TiktokenTokenizer(toy_directory(tmp_path / "plain"))
    _, config = _configured(tmp_path / "plain")
    as_object = {name: {"content": config[name]} for name in ("bos_token", "eos_token")}
    names = {number: e["content"] for number, e in config["added_tokens_decoder"].items()}
    spellings = {
        "object": as_object,
        "list": {"eos_token": [config["eos_token"]]},
        "strings": {"added_tokens_decoder": names},
        "map": {"eos_token": "absent"},
    }
    for name, changes in spellings.items():
        directory, _ = _configured(tmp_path / name, **changes)
        if name == "map":
            (directory / "special_tokens_map.json").write_text(json.dumps(as_object))
        found = TiktokenTokenizer(directory)
        assert (found.eod_id, found.bos_id) == (plain.eod_id, plain.bos_id), name
        found.save(tmp_path / "saved" / name)
        assert TiktokenTokenizer(tmp_path / "saved" / name).identity == found.identity
    directory, _ = _configured(tmp_path / "null", bos_token=None)
    assert (TiktokenTokenizer(directory).bos_id, TiktokenTokenizer(directory).eod_id) == (
        None,
        plain.eod_id,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eos_token": "<|other|>"}, r"eos_token '<\|other\|>' is not among the control tokens"),
        ({"eos_token": None}, "no eos_token; expected Kimi K2's file"),
        ({"added_tokens_decoder": "absent"}, "no added_tokens_decoder; expected"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder has 'x'"),
        ({"added_tokens_decoder": {"260": 3}}, "added_tokens_decoder has '260': 3"),
        ({"added_tokens_decoder": ["a"]}, "added_tokens_decoder is list"),
    ],
)
def test_special_tokens_that_cannot_be_told_are_refused_by_name(tmp_path, changes, said):
    directory, _ = _configured(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        TiktokenTokenizer(directory)
