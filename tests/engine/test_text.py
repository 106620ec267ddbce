"""Text of growing tokens: whole characters, and strings that end it, however it is cut."""

import random

import pytest

from megatron_k2.engine.text import StopStrings, TextPieces


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_text_and_break_no_character(seed):
    draw, text = random.Random(seed), "naïve 東京 🙂 ok"
    data, pieces, found = list(text.encode()), TextPieces(Bytes()), []
    while data:
        count = draw.randint(1, 3)
        found.append(pieces.feed(data[:count]))
        data = data[count:]
    found.append(pieces.close())
    assert "".join(found) == text
    assert "�" not in "".join(found)


def test_a_character_that_never_ends_is_a_replacement():
    pieces = TextPieces(Bytes())
    assert pieces.feed(b"ab\xf0\x9f") == ""
    assert pieces.close() == "ab�"


def test_what_a_text_follows_is_not_given_out():
    class Spaced:
        """A word's first letter takes a space where something stands before it."""

        def decode(self, ids):
            return " ".join("abc"[i] for i in ids)

    assert TextPieces(Spaced()).feed([1]) == "b"
    pieces = TextPieces(Spaced(), [0])
    assert [pieces.feed([1]), pieces.feed([2]), pieces.close()] == [" b", " c", ""]


@pytest.mark.parametrize("seed", range(20))
def test_a_text_is_cut_at_the_first_stop_string(seed):
    draw, text = random.Random(seed), "aab abc abd END xyz"
    stops = draw.sample(["abd", "END", "zz", "c a"], 2)
    places = [(text.find(s), s) for s in stops if s in text]
    stop, found, rest = StopStrings(stops), "", text
    while rest:
        count = draw.randint(1, 4)
        found += stop.feed(rest[:count])
        rest = rest[count:]
    if stop.found is None:
        found += stop.close()
    assert found == (text[: min(places)[0]] if places else text)
    assert stop.found == (min(places)[1] if places else None)
