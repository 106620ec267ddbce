"""What a file's name says about it, in any case; JSON is read as JSON or refused, never as text."""

import gzip
import json

import pytest

from megatron_k2.data.indexed import read_tokens
from megatron_k2.data.kinds import UNREAD_SUFFIXES
from megatron_k2.data.parts import cut_into_parts, read_documents
from megatron_k2.data.prepare import prepare
from megatron_k2.data.prepare_plan import PrepareOptions
from megatron_k2.data.sources import find_files, passed_over
from megatron_k2.errors import UserError

TEXTS = [f"Document {i}: über\nbrown" for i in range(40)]
OBJECTS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in OBJECTS).encode()
ARRAY = json.dumps(OBJECTS, indent=1).encode()


def _read(path, key="text", part_bytes=1 << 20):
    parts = cut_into_parts([(file, 0.0) for file in find_files([path], ())], part_bytes)
    return [document for part in parts for _, document in read_documents(part, key)]


def _texts(path, **options):
    return [document.text for document in _read(path, **options)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("part_bytes", [100, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"c{suffix}", LINES) for suffix in (".jsonl", ".JSONL", ".ndjson", ".json", ".Json")),
        ("c.json", ARRAY),
        ("c.json", b"\n\n " + ARRAY),
        ("c.jsonl", b"\xef\xbb\xbf" + LINES),
        ("c.json", b"\xef\xbb\xbf" + LINES),
        ("c.json", b"\xef\xbb\xbf" + ARRAY),
        ("c.jsonl", LINES.replace(b"}\n", b"}\r\n").rstrip()),
    ],
)
def test_objects_give_the_same_documents_in_every_wrapping(
    tmp_path, name, content, packed, part_bytes
):
    path = tmp_path / (name + (".GZ" if packed and name.isupper() else ".gz" if packed else ""))
    path.write_bytes(gzip.compress(content) if packed else content)
    documents = _read(path, part_bytes=part_bytes)
    assert [document.text for document in documents] == TEXTS
    assert len({document.id for document in documents}) == len(TEXTS)


def test_a_single_object_over_many_lines_is_one_document(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(OBJECTS[3], indent=2))
    assert _texts(tmp_path / "c.json") == [TEXTS[3]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.json", b"some words\n", "neither one JSON object a line nor one array"),
        ("c.json", b"{\n" + LINES, "neither one JSON object"),
        ("c.json", b"[1, 2]", "element 1: expected a JSON object, found int"),
        ("c.json", b'[{"text": "a"}, {"body": "b"}]', "element 2: no key 'text'"),
        ("c.json", b"3", "expected objects, found int"),
        ("c.json", b"[" * 100_000, "neither one JSON object"),
        ("c.json", LINES + b"[1]\n", r"c\.json:41: expected a JSON object, found list"),
        ("c.jsonl", ARRAY.replace(b"\n", b""), r"c\.jsonl:1: expected a JSON object, found list"),
        ("c.jsonl", LINES + b'{"text": "x", "m": ' + b"[" * 100_000, "nested too deeply"),
        (
            "c.jsonl",
            LINES + b'{"text": "x", "n": ' + b"1" * 5000 + b"}",
            r"c\.jsonl:41: .*thousands of digits",
        ),
        ("c.jsonl", LINES.replace(b"}\n", b"}\r"), "a CR alone does not end a line"),
        ("c.jsonl.gz", gzip.compress(LINES)[:-20], "not a whole gzip file"),
        ("c.jsonl.gz", LINES, "not a whole gzip file"),
        ("c.jsonl", gzip.compress(LINES), "not UTF-8"),
        ("c.jsonl.txt", LINES, "holds JSON, one object a line, and its name says text"),
        ("c.txt", b'\n {"text": "x"}', "one object a line"),
        ("c.txt", ARRAY, "holds JSON, and its name says text; rename it to .json"),
        ("c.md", json.dumps(OBJECTS[0], indent=1).encode(), "rename it to .json"),
        ("c", LINES, "rename it to .jsonl"),
        ("c.txt", b"version https://git-lfs.github.com/spec/v1\noid x\n", "Git LFS pointer"),
        ("c.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "Git LFS pointer"),
        *((f"c.jsonl{s}", LINES, f"{s} is not read") for s in UNREAD_SUFFIXES),
        ("C.JSONL.ZST", LINES, "unpack it .zstd -d."),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        _texts(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["[link](x) and text", "{% raw %}\n", "[1]\n", '{"a": 1}\nand prose\n', ""]
)
def test_text_that_only_begins_like_json_is_text(tmp_path, text):
    (tmp_path / "c.md").write_text(text)
    assert _texts(tmp_path / "c.md") == [text]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfhello\r\n")
    assert _texts(tmp_path / "c.txt") == ["hello\r\n"]


def test_of_a_directory_endings_count_in_any_case_and_what_is_left_is_told(tmp_path):
    for name in ("a.JSONL", "b.Txt", "c.json", "d.jsonl.gz", "e.JSON", "f.py", "g.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
    assert [f.name for f in find_files([tmp_path], (".jsonl", ".txt"))] == ["a.JSONL", "b.Txt"]
    left = {".json": 2, ".jsonl.gz": 1, ".jsonl.zst": 1}
    assert passed_over([tmp_path], (".jsonl", ".txt")) == left
    assert passed_over([tmp_path / "a.JSONL"], (".txt",)) == {}


def test_a_json_key_that_applies_to_no_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.JSON.gz").write_bytes(gzip.compress(LINES))

    def options(*inputs):
        return PrepareOptions(
            tmp_path / "out", inputs=inputs, train_bpe=300, json_key="text", validation_fraction=0
        )

    with pytest.raises(UserError, match="--json-key text: no input is JSON by its name"):
        prepare(options(tmp_path / "a.txt"))
    assert not (tmp_path / "out").exists()
    found = prepare(options(tmp_path / "a.txt", tmp_path / "b.JSON.gz"))
    assert found.splits["train"].num_documents == 1 + len(TEXTS)


def test_every_wrapping_gives_the_same_tokens(tmp_path):
    wrapped = {"a.jsonl": LINES, "b.json": ARRAY, "c.jsonl.gz": gzip.compress(LINES)}
    for name, content in wrapped.items():
        (tmp_path / name).write_bytes(content)
        prepare(
            PrepareOptions(
                tmp_path / name.replace(".", "_"),
                inputs=(tmp_path / name,),
                train_bpe=300,
                validation_fraction=0,
            )
        )
    first, *others = (read_tokens(tmp_path / name.replace(".", "_") / "train") for name in wrapped)
    assert len(first) > len(TEXTS)
    assert all((first == other).all() for other in others)
