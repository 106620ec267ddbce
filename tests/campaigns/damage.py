"""Ways to damage a file that make it wrong for certain; each says in a few words what it did."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

type Damage = Callable[[random.Random, Path], str]
"""Spoils the file given; returns what was done."""

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 7340032\n"
PAGE = b"<!DOCTYPE html><html><body>Access to model is restricted.</body></html>\n"
NO_NUMBERS: tuple[Any, ...] = ("seven", [], {}, None, -1, 0, 1.5, 10**30, [[1]], {"a": 1})
"""What no size of a model is."""


def cut(rng: random.Random, path: Path) -> str:
    size = path.stat().st_size
    # Not one byte: of a text file that may be the last line end, which is no damage.
    kept = rng.choice([0, 1, size // 2, rng.randrange(size - 1), size - 2])
    with path.open("rb+") as file:
        file.truncate(kept)
    return f"cut to {kept} of {size}"


def absent(rng: random.Random, path: Path) -> str:
    path.unlink()
    return "absent"


def directory(rng: random.Random, path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "a directory"


def dangling(rng: random.Random, path: Path) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "a dangling link"


def replaced(rng: random.Random, path: Path) -> str:
    contents = {
        "an LFS pointer": LFS % 0,
        "a web page": PAGE,
        "zeros": bytes(path.stat().st_size),
        "random bytes": rng.randbytes(4096),
        "nesting": b"[" * 100_000,
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "null": b"null",
        "a number": b"3",
        "a list": b'["a"]',
        "a text": b'"text"',
        "half a document": b'{"a": [1, 2',
    }
    name = rng.choice(sorted(contents))
    path.write_bytes(contents[name])
    return name


ANY = (cut, absent, directory, dangling, replaced)


def spoiled(rng: random.Random, path: Path, ways: tuple[Damage, ...] = ANY) -> str:
    """One way of several, by chance."""
    return f"{path.name}: {rng.choice(ways)(rng, path)}"


def with_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def key_spoiled(rng: random.Random, path: Path, keys: tuple[str, ...]) -> str:
    """One of ``keys``, which are all needed and numbers, away or no number."""
    key, value = rng.choice(keys), rng.choice(NO_NUMBERS)
    is_absent = rng.random() < 0.2

    def change(content: dict[str, Any]) -> dict[str, Any]:
        content = content | {key: value}
        return {k: v for k, v in content.items() if not (is_absent and k == key)}

    with_json(path, change)
    return f"{key}: {'absent' if is_absent else repr(value)}"
