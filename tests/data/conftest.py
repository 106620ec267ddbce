"""A small corpus on disk that has everything awkward in it."""

import json
import random

import pytest

WORDS = "alpha beta gamma delta Größe 你好 return def <|eod|> 12345 \n \t".split(" ")


def _sentence(rng, num_words):
    return " ".join(rng.choices(WORDS, k=num_words))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Text files, an empty one, and a JSONL of about 1.5 MB: more than one part."""
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    (root / "sub").mkdir()
    for i in range(30):
        (root / "sub" / f"{i:02d}.txt").write_text(_sentence(rng, 200), encoding="utf-8")
    (root / "sub" / "empty.txt").write_text("")
    with (root / "lines.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(1300):
            record = {"text": _sentence(rng, rng.randrange(0, 400))}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return root
