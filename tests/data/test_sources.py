"""Readers of documents: order, ids, the split, and what a bad line says."""

import json

import pytest

from megatron_k2.data.sources import (
    find_files,
    is_validation,
    python_stdlib_files,
    read_jsonl_range,
    read_text_file,
)
from megatron_k2.errors import UserError

FIXED = [
    "dir/7.txt",
    "dir/14.txt",
    "dir/21.txt",
    "dir/44.txt",
    "dir/51.txt",
    "dir/52.txt",
    "dir/53.txt",
    "dir/55.txt",
    "dir/62.txt",
    "dir/63.txt",
    "dir/65.txt",
    "dir/70.txt",
    "dir/75.txt",
]


def jsonl(path, lines):
    path.write_bytes(b"".join(lines))
    return find_files([path], ())[0]


def read(file, key="text"):
    return list(read_jsonl_range(file, key, 0, file.num_bytes))


def test_a_directory_is_read_recursively_in_the_order_of_relative_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a/skip.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = find_files([tmp_path], (".txt",))
    assert [f.name for f in files] == ["a/b/c.txt", "a/z.txt", "b.txt"]
    assert read_text_file(files[0]).text == "a/b/c.txt"


def test_inputs_that_are_absent_empty_or_named_twice_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="does not exist"):
        find_files([tmp_path / "none"], (".txt",))
    with pytest.raises(UserError, match=r"no file ends in \.py"):
        find_files([tmp_path], (".py",))
    with pytest.raises(UserError, match="named twice"):
        find_files([tmp_path, tmp_path / "a.txt"], (".txt",))


@pytest.mark.parametrize("step", [1, 2, 7, 30, 1000])
def test_byte_ranges_that_tile_a_file_read_every_line_once(tmp_path, step):
    texts = ["one", "", "three é", "four\nlines", "x" * 50, "last"]
    lines = [json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in texts]
    lines.insert(2, b"\n")
    lines[-1] = lines[-1].rstrip(b"\n")
    file = jsonl(tmp_path / "d.jsonl", lines)
    ranges = [(s, min(s + step, file.num_bytes)) for s in range(0, file.num_bytes, step)]
    documents = [d for s, e in ranges for d in read_jsonl_range(file, "text", s, e)]
    assert [d.text for d in documents] == texts
    assert len({d.id for d in documents}) == len(texts)
    assert documents == read(file)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "a"\n', "not JSON"),
        (b'{"body": "a"}\n', r"no key 'text' \(keys: body\)"),
        (b'{"text": 3}\n', "'text' is int"),
        (b'["text"]\n', "expected a JSON object, found list"),
        (b'{"text": "\xff"}\n', "not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}\n', "lone surrogate at character 0"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, bad, message):
    good = b'{"text": "fine"}\n'
    file = jsonl(tmp_path / "d.jsonl", [good, b"\n", good, bad, good])
    with pytest.raises(UserError, match=rf"d\.jsonl:4: .*{message}"):
        read(file)
    # Also for a range that begins in the middle of the file.
    with pytest.raises(UserError, match=rf"d\.jsonl:4: .*{message}"):
        list(read_jsonl_range(file, "text", len(good) + 1, file.num_bytes))


def test_a_text_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 3"):
        read_text_file(find_files([tmp_path / "a.txt"], ())[0])


def test_line_ends_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_text_file(find_files([tmp_path / "a.txt"], ())[0]).text == "a\r\nb\rc\n"


def test_the_standard_library_comes_without_tests_and_is_valid_utf8():
    files = python_stdlib_files()
    names = [f.name for f in files]
    assert "argparse.py" in names
    assert "asyncio/base_events.py" in names
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert 8e6 < sum(f.num_bytes for f in files) < 30e6
    assert names == sorted(names)
    assert all(read_text_file(f).num_bytes == f.num_bytes for f in files[::20])


def test_the_split_takes_the_asked_share_and_grows_without_moving_anything():
    ids = [f"dir/{i}.txt" for i in range(20_000)]
    small = {i for i in ids if is_validation(i, 0.05)}
    large = {i for i in ids if is_validation(i, 0.10)}
    # Binomial: 1000 expected, standard deviation 31.
    assert abs(len(small) - 1000) < 5 * 31
    assert small < large
    assert not any(is_validation(i, 0.0) for i in ids)
    assert all(is_validation(i, 1.0) for i in ids)
    # A fixed point: another hash would leak validation text of old runs into new training.
    assert [i for i in ids[:80] if i in large] == FIXED
